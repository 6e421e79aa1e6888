// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
)

const testEntry = `{"type":"shunt-cni","logLevel":"warn"}`

func TestSplice(t *testing.T) {
	for _, c := range []struct{ name, in, out string }{
		{"one line", `{"name":"n","plugins":[{"type":"a"}]}`, `{"name":"n","plugins":[{"type":"a"},` + testEntry + `]}`},
		{"one line with blanks", `{"name":"n","plugins":[ {"type":"a"}, {"type":"b"} ]}` + "\n", `{"name":"n","plugins":[ {"type":"a"}, {"type":"b"}, ` + testEntry + ` ]}` + "\n"},
		{
			"lines",
			"{\n  \"name\": \"n\",\n  \"plugins\": [\n    {\n      \"type\": \"a\"\n    }\n  ]\n}\n",
			"{\n  \"name\": \"n\",\n  \"plugins\": [\n    {\n      \"type\": \"a\"\n    },\n    {\n      \"type\": \"shunt-cni\",\n      \"logLevel\": \"warn\"\n    }\n  ]\n}\n",
		},
		{
			"tabs, a bracket on the same line",
			"{\n\t\"name\": \"n\",\n\t\"plugins\": [{\n\t\t\"type\": \"a\"\n\t}, {\n\t\t\"type\": \"b\"\n\t}]\n}",
			"{\n\t\"name\": \"n\",\n\t\"plugins\": [{\n\t\t\"type\": \"a\"\n\t}, {\n\t\t\"type\": \"b\"\n\t}, {\n\t\t\"type\": \"shunt-cni\",\n\t\t\"logLevel\": \"warn\"\n\t}]\n}",
		},
		{
			"CRLF",
			"{\"name\": \"n\",\r\n \"plugins\": [\r\n  {\r\n   \"type\": \"a\"\r\n  }\r\n ]}\r\n",
			"{\"name\": \"n\",\r\n \"plugins\": [\r\n  {\r\n   \"type\": \"a\"\r\n  },\r\n  {\r\n   \"type\": \"shunt-cni\",\r\n   \"logLevel\": \"warn\"\r\n  }\r\n ]}\r\n",
		},
		{
			"items on a line each",
			"{\"name\":\"n\",\"plugins\":[\n  {\"type\":\"a\"},\n  {\"type\":\"b\"}\n]}",
			"{\"name\":\"n\",\"plugins\":[\n  {\"type\":\"a\"},\n  {\"type\":\"b\"},\n  " + testEntry + "\n]}",
		},
		{
			"plugins in other places too",
			`{"x":{"plugins":[{"type":"no"}]},"name":"plugins","y":"\"plugins\":[","plugins":[{"type":"a","plugins":[1]}],"z":["plugins"]}`,
			`{"x":{"plugins":[{"type":"no"}]},"name":"plugins","y":"\"plugins\":[","plugins":[{"type":"a","plugins":[1]},` + testEntry + `],"z":["plugins"]}`,
		},
		{"the key twice: the last counts", `{"plugins":[{"type":"x"}],"name":"n","plugins":[{"type":"a"}]}`, `{"plugins":[{"type":"x"}],"name":"n","plugins":[{"type":"a"},` + testEntry + `]}`},
		{"the key with escapes", `{"name":"n","pl\u0075gins":[{"type":"a"}]}`, `{"name":"n","pl\u0075gins":[{"type":"a"},` + testEntry + `]}`},
		{"numbers, unicode, markup", `{"name":"n","big":123456789012345678901234567890,"e":1E400e0"`, ""},
		{
			"large numbers, unicode, markup", `{"name":"n","plugins":[{"type":"a","n":123456789012345678901234567890,"f":1.10e+02,"s":"\u00fc ü <&> 🙂"}]}`,
			`{"name":"n","plugins":[{"type":"a","n":123456789012345678901234567890,"f":1.10e+02,"s":"\u00fc ü <&> 🙂"},` + testEntry + `]}`,
		},
		{"there already", `{"name":"n","plugins":[{"type":"a"},{ "type":"shunt-cni", "logLevel" : "warn"}]}`, `{"name":"n","plugins":[{"type":"a"},{ "type":"shunt-cni", "logLevel" : "warn"}]}`},
		{"there, another", `{"name":"n","plugins":[{"type":"a"}, {"type":"shunt-cni","logLevel":"info"} ]}`, `{"name":"n","plugins":[{"type":"a"}, ` + testEntry + ` ]}`},
		{"there, not last", `{"name":"n","plugins":[{"type":"a"}, ` + testEntry + `, {"type":"b"}]}`, `{"name":"n","plugins":[{"type":"a"}, {"type":"b"}, ` + testEntry + `]}`},
		{"there, first", `{"name":"n","plugins":[` + testEntry + `, {"type":"b"}]}`, `{"name":"n","plugins":[{"type":"b"},` + testEntry + `]}`},
		{
			"there three times", `{"name":"n","plugins":[{"type":"shunt-cni"},{"type":"shunt-cni"},{"type":"a"},{"type":"shunt-cni"},` + testEntry + `]}`,
			`{"name":"n","plugins":[{"type":"a"},` + testEntry + `]}`,
		},
		{"a type with escapes", `{"name":"n","plugins":[{"type":"a"},{"type":"shunt\u002dcni"}]}`, `{"name":"n","plugins":[{"type":"a"},` + testEntry + `]}`},
		{"no plugins", `{"name":"n","plugins":[]}`, ""},
		{"a mark before it", "\ufeff" + `{"name":"n","plugins":[{"type":"a"}]}`, ""},
		{"something after it", `{"name":"n","plugins":[{"type":"a"}]}{}`, ""},
		{"a comment", "{\"name\":\"n\", // no\n\"plugins\":[{\"type\":\"a\"}]}", ""},
		{"null", `{"name":"n","plugins":[null]}`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := parseList([]byte(c.in))
			if err != nil {
				if c.out != "" {
					t.Fatal(err)
				}
				return
			}
			out, err := l.with([]byte(testEntry))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.out, string(out)); diff != "" {
				t.Fatalf("with the entry (-want +got):\n%s", diff)
			}
			checkSplice(t, l, []byte(testEntry))
		})
	}
}

// checkSplice checks what is true of every list that has a plugin of others.
func checkSplice(t *testing.T, l *list, entry []byte) {
	t.Helper()
	out, err := l.with(entry)
	if err != nil {
		t.Fatal(err)
	}
	with, err := parseList(out)
	if err != nil {
		t.Fatalf("the result can't be read: %v\n%q", err, out)
	}
	// Others are as they were, byte for byte, and in their order; ours is one,
	// and the last.
	if ours, _ := with.count(); ours != 1 || !with.ours(len(with.plugins)-1) {
		t.Errorf("the entry is not there once, and last: %q", out)
	}
	if last := with.plugins[len(with.plugins)-1].of(out); !sameJSON(last, entry) {
		t.Errorf("the entry is %s, not %s", last, entry)
	}
	if diff := cmp.Diff(others(l), others(with)); diff != "" {
		t.Errorf("others' plugins (-before +after):\n%s", diff)
	}
	if a, b := l.text[:l.array.start], out[:with.array.start]; !bytes.Equal(a, b) {
		t.Errorf("before the plugins: %q, was %q", b, a)
	}
	if a, b := l.text[l.array.end:], out[with.array.end:]; !bytes.Equal(a, b) {
		t.Errorf("after the plugins: %q, was %q", b, a)
	}
	again, err := with.with(entry)
	if err != nil || !bytes.Equal(again, out) {
		t.Errorf("once more it is %q, %v; was %q", again, err, out)
	}
	// What was added goes exactly.
	without, want := with.without(), l.text
	if ours, _ := l.count(); ours > 0 {
		want = l.without()
	}
	if !bytes.Equal(without, want) {
		t.Errorf("taken out again: %q, want %q", without, want)
	}
	// Runtimes read the same of it as of the old one.
	if diff := cmp.Diff(confs(t, want), confs(t, without)); diff != "" {
		t.Errorf("libcni reads (-want +got):\n%s", diff)
	}
}

func others(l *list) (out []string) {
	for i, s := range l.plugins {
		if !l.ours(i) {
			out = append(out, string(s.of(l.text)))
		}
	}
	return out
}

func confs(t *testing.T, text []byte) (out []string) {
	t.Helper()
	conf, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range conf.Plugins {
		out = append(out, string(p.Bytes))
	}
	return out
}

func FuzzSplice(f *testing.F) {
	for _, s := range []string{
		`{"name":"n","plugins":[{"type":"a"}]}`,
		"{\r\n\t\"name\":\"n\",\r\n\t\"plugins\":[\r\n\t\t{\r\n\t\t\t\"type\":\"a\"\r\n\t\t} ,{\"type\":\"shunt-cni\"}\r\n\t]\r\n}",
		`{"plugins":1,"name":"n","pl\u0075gins":[{"type":"a","Type":"shunt-cni"},{"type":"shunt-cni","type":"b"}]}`,
		"{\"name\":\"n\",\"plugins\":[\n{\"type\":\"a\"\n}\n]}",
	} {
		f.Add([]byte(s), []byte(testEntry))
	}
	f.Add([]byte("{\"name\":\"n\",\"plugins\":[\n{\"type\":\"a\"\n}\n]}"), []byte(" "+testEntry+"\n"))
	f.Add([]byte(`{"name":"n","plugins":[{"type":"shunt-cni"},{"type":"a"}]}`), []byte(`{"type":"shunt-cni","excludeNamespaces":["a",
	"b"]}`))
	f.Fuzz(func(t *testing.T, text, entry []byte) {
		var object map[string]any
		if json.Unmarshal(entry, &object) != nil {
			return
		}
		if e, err := libcni.NetworkPluginConfFromBytes(entry); err != nil || e.Network.Type != pluginType {
			return
		}
		// As libcni reads it out of a list.
		if l, err := libcni.NetworkConfFromBytes([]byte(`{"name":"n","plugins":[` + string(entry) + `]}`)); err != nil || l.Plugins[0].Network.Type != pluginType {
			return
		}
		l, err := parseList(text)
		if err != nil {
			return
		}
		if len(l.plugins) == 0 {
			return
		}
		if _, others := l.count(); others > 0 {
			checkSplice(t, l, entry)
		}
	})
}

// FuzzWrap: a list made of a single configuration has it byte for byte, and a
// runtime reads of it what it would make of the configuration itself.
func FuzzWrap(f *testing.F) {
	f.Add([]byte(`{"name":"n","cniVersion":"0.4.0","type":"bridge","n":12345678901234567890}`))
	f.Add([]byte("\n{\"name\":\"\\u00e4<&>\",\r\n\t\"Type\":\"a\"}\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		conf, err := libcni.NetworkPluginConfFromBytes(text)
		if err != nil || conf.Network.Type == pluginType {
			return
		}
		want, err := libcni.ConfListFromConf(conf) //nolint:staticcheck // runtimes use it
		if err != nil {
			return
		}
		out, err := wrap(text, conf, "10-a.conf", []byte(testEntry))
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseList(out)
		if err != nil {
			t.Fatalf("%v\n%q", err, out)
		}
		if wrappedFrom(out) != "10-a.conf" || got.conf.Name != want.Name || len(got.plugins) != 2 || !got.ours(1) {
			t.Fatalf("%q", out)
		}
		if !bytes.Equal(got.plugins[0].of(out), bytes.TrimSpace(text)) || !bytes.Equal(got.conf.Plugins[0].Bytes, want.Plugins[0].Bytes) {
			t.Fatalf("%q became %q", text, out)
		}
		if tooOld(conf.Network.CNIVersion) != (got.conf.CNIVersion != want.CNIVersion) && conf.Network.CNIVersion != wrapVersion {
			t.Fatalf("version %q became %q", want.CNIVersion, got.conf.CNIVersion)
		}
	})
}

func TestNetconf(t *testing.T) {
	for _, c := range []struct{ in, chained, conf, list string }{
		{
			`{"type":"shunt-cni"}`, `{"type":"shunt-cni"}`,
			"{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"shunt\",\n  \"type\": \"shunt-cni\"\n}\n",
			"{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"shunt\",\n  \"plugins\": [\n    {\n      \"type\": \"shunt-cni\"\n    }\n  ]\n}\n",
		},
		{
			"{\n \"name\" : \"x\", \"type\": \"shunt-cni\", \"cniVersion\":\"1.1.0\", \"proxy\": {\"uid\": 1}}", `{"type":"shunt-cni","proxy":{"uid": 1}}`,
			"{\n  \"cniVersion\": \"1.1.0\",\n  \"name\": \"x\",\n  \"type\": \"shunt-cni\",\n  \"proxy\": {\n    \"uid\": 1\n  }\n}\n", "",
		},
	} {
		chained, err := chainedEntry([]byte(c.in))
		if err != nil || string(chained) != c.chained {
			t.Errorf("%s in a chain: %s, %v", c.in, chained, err)
		}
		conf, err := standaloneConf([]byte(c.in), false)
		if err != nil || string(conf) != c.conf {
			t.Errorf("%s as a file: %s, %v", c.in, conf, err)
		}
		if c.list != "" {
			list, err := standaloneConf([]byte(c.in), true)
			if err != nil || string(list) != c.list {
				t.Errorf("%s as a list: %s, %v", c.in, list, err)
			}
		}
	}
	for in, want := range map[string]string{
		`{"type":"bridge"}`:                                   `"bridge" is not "shunt-cni"`,
		`{"type":"shunt-cni","prevResult":{"ips":[]}}`:        "prevResult",
		`{"type":"shunt-cni","loglevel":"warn"}`:              "logLevel",
		`{"type":"shunt-cni"`:                                 "JSON",
		`{"type":"shunt-cni","logLevel":"warn","logLevel":1}`: "twice",
	} {
		if err := checkEntry([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error with %q", in, err, want)
		}
	}
}
