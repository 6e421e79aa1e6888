// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	const passing = `{"Action":"start","Package":"shunt.dev/shunt/loader"}
{"Action":"run","Package":"shunt.dev/shunt/loader","Test":"TestA"}
{"Action":"output","Package":"shunt.dev/shunt/loader","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"pass","Package":"shunt.dev/shunt/loader","Test":"TestA","Elapsed":0.1}
`
	const end = `{"Action":"pass","Package":"shunt.dev/shunt/loader","Elapsed":0.2}
`
	const skip = `{"Action":"output","Package":"shunt.dev/shunt/loader","Test":"TestB","Output":"    a_test.go:7: SKIP-PRIVILEGED: no root\n"}
{"Action":"skip","Package":"shunt.dev/shunt/loader","Test":"TestB"}
`
	for _, c := range []struct {
		name, in string
		allowed  []string
		tally    tally
		verdict  string   // part of the error; "" for none
		output   []string // parts of the output
	}{
		{name: "pass", in: passing + end, tally: tally{passed: 1}, output: []string{"ok    loader"}},
		{name: "nothing", in: "", verdict: "no test ran"},
		{
			name: "cut short", in: passing, tally: tally{passed: 1},
			verdict: "shunt.dev/shunt/loader did not end",
		},
		{
			name: "no tests in a package",
			in: passing + end + `{"Action":"start","Package":"shunt.dev/shunt/bpf"}
{"Action":"output","Package":"shunt.dev/shunt/bpf","Output":"?   \tshunt.dev/shunt/bpf\t[no test files]\n"}
{"Action":"skip","Package":"shunt.dev/shunt/bpf","Elapsed":0}
`,
			tally: tally{passed: 1},
		},
		{
			name: "fail",
			in: passing + `{"Action":"output","Package":"shunt.dev/shunt/loader","Test":"TestC/x","Output":"    a_test.go:9: got 1\n"}
{"Action":"fail","Package":"shunt.dev/shunt/loader","Test":"TestC/x"}
{"Action":"fail","Package":"shunt.dev/shunt/loader","Elapsed":0.2}
`,
			tally: tally{passed: 1, failed: 1}, verdict: "1 failed",
			output: []string{"--- FAIL: loader TestC/x", "a_test.go:9: got 1", "FAIL  loader"},
		},
		{
			name: "build",
			in: `{"ImportPath":"shunt.dev/shunt/loader [x.test]","Action":"build-output","Output":"loader/a.go:1: undefined: x\n"}
{"ImportPath":"shunt.dev/shunt/loader [x.test]","Action":"build-fail"}
{"Action":"start","Package":"shunt.dev/shunt/loader"}
{"Action":"fail","Package":"shunt.dev/shunt/loader","Elapsed":0,"FailedBuild":"shunt.dev/shunt/loader [x.test]"}
`,
			tally: tally{failed: 1}, verdict: "1 failed", output: []string{"undefined: x"},
		},
		{
			name: "TestMain",
			in: passing + `{"Action":"output","Package":"shunt.dev/shunt/loader","Output":"testbed: left behind by this process\n"}
{"Action":"fail","Package":"shunt.dev/shunt/loader","Elapsed":0.2}
`,
			tally: tally{passed: 1, failed: 1}, verdict: "1 failed", output: []string{"left behind"},
		},
		{
			name: "skip", in: passing + skip + end, tally: tally{passed: 1, skipped: 1},
			verdict: "no list allows: loader TestB", output: []string{"SKIPPED (NOT ALLOWED): loader TestB", "no root"},
		},
		{
			name: "allowed skip", in: passing + skip + end, allowed: []string{"loader TestB"},
			tally: tally{passed: 1, skipped: 1}, output: []string{"SKIPPED (allowed): loader TestB"},
		},
		{
			name: "no event", in: passing + end + "warning: something\n", tally: tally{passed: 1},
			output: []string{"warning: something\n"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out bytes.Buffer
			allowed := map[string]bool{}
			for _, a := range c.allowed {
				allowed[a] = true
			}
			r := newReport(&out, allowed)
			if err := r.read(strings.NewReader(c.in)); err != nil {
				t.Fatal(err)
			}
			if r.tally != c.tally {
				t.Errorf("tally is %v, want %v", r.tally, c.tally)
			}
			verdict := ""
			if err := r.verdict(); err != nil {
				verdict = err.Error()
			}
			if (c.verdict == "") != (verdict == "") || !strings.Contains(verdict, c.verdict) {
				t.Errorf("verdict is %q, want %q", verdict, c.verdict)
			}
			for _, part := range c.output {
				if !strings.Contains(out.String(), part) {
					t.Errorf("output has no %q:\n%s", part, out.String())
				}
			}
		})
	}
}

func TestReadAllowed(t *testing.T) {
	got, err := readAllowed(strings.NewReader("# no\n\nloader TestX needs what no machine has\n"))
	if err != nil || len(got) != 1 || !got["loader TestX"] {
		t.Errorf("got %v, %v", got, err)
	}
	if got, err := readAllowed(strings.NewReader("loader TestX\n")); err == nil {
		t.Errorf("an entry without a reason is taken: %v", got)
	}
}

func TestReadTallies(t *testing.T) {
	want := tally{passed: 11, failed: 2, skipped: 3}
	got, err := readTallies(strings.NewReader("1 passed, 2 failed, 0 skipped\n10 passed, 0 failed, 3 skipped\n"))
	if err != nil || got != want {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	if got, err := readTallies(strings.NewReader("one passed\n")); err == nil {
		t.Errorf("nonsense is taken: %v", got)
	}
}
