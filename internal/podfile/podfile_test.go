// SPDX-License-Identifier: Apache-2.0

package podfile

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"shunt.dev/shunt/redirect"
)

const (
	asYAML = `
apiVersion: v1
kind: Pod
metadata:
  name: a
  namespace: b
  annotations:
    x: |
      one
      --- two
spec:
  securityContext:
    runAsUser: 7
    runAsGroup: 8
  containers:
  - name: c
status:
  podIP: 10.0.0.1
  podIPs:
  - ip: 10.0.0.1
  - ip: fd00::1
`
	asJSON = `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a","namespace":"b","annotations":{"x":"one\n--- two\n"}},
"spec":{"securityContext":{"runAsUser":7,"runAsGroup":8},"containers":[{"name":"c"}]},
"status":{"podIP":"10.0.0.1","podIPs":[{"ip":"10.0.0.1"},{"ip":"fd00::1"}]}}`
)

func TestParse(t *testing.T) {
	user, group := int64(7), int64(8)
	want := &File{
		Pod: &redirect.Pod{
			ObjectMeta: redirect.ObjectMeta{Namespace: "b", Name: "a", Annotations: map[string]string{"x": "one\n--- two\n"}},
			PodSpec:    redirect.PodSpec{Containers: []redirect.Container{{Name: "c"}}},
		},
		IPs:       []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
		RunAsUser: &user, RunAsGroup: &group,
	}
	list := func(s string) string { return `{"apiVersion":"v1","kind":"List","items":[` + s + `]}` }
	for name, in := range map[string]string{
		"YAML":                  asYAML,
		"JSON":                  asJSON,
		"list of one":           list(asJSON),
		"list of one as YAML":   "kind: PodList\nitems:\n-" + strings.ReplaceAll(asYAML, "\n", "\n  "),
		"a document's marks":    "# a comment\n---" + asYAML + "---\n# nothing\n",
		"without kind":          strings.ReplaceAll(strings.ReplaceAll(asYAML, "kind: Pod\n", ""), "apiVersion: v1\n", ""),
		"podIP alone":           "",
		"carriage returns":      strings.ReplaceAll(strings.ReplaceAll(asYAML, "    x: |\n      one\n      --- two\n", "    x: \"one\\n--- two\\n\"\n"), "\n", "\r\n"),
		"JSON's own escapes":    strings.Replace(asJSON, `"one\n`, `"\u006fne\n`, 1),
		"JSON of several lines": strings.ReplaceAll(asJSON, ",", ",\n\t"),
	} {
		t.Run(name, func(t *testing.T) {
			want := *want
			if name == "podIP alone" {
				in, want.IPs = strings.Replace(asJSON, `,"podIPs":[{"ip":"10.0.0.1"},{"ip":"fd00::1"}]`, "", 1), want.IPs[:1]
			}
			got, err := Parse([]byte(in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	surrogates := strings.Replace(asJSON, `"one\n--- two\n"`, `"\ud83d\ude00"`, 1)
	if f, err := Parse([]byte(surrogates)); err != nil || f.Pod.Annotations["x"] != "\U0001f600" {
		t.Errorf("surrogates: %v, %v", f, err)
	}
}

func TestErrors(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"", "it is empty: expected a Pod as YAML or JSON"},
		{"---\n# nothing\n---\n", "it is empty"},
		{asYAML + "---" + asYAML, "it holds 2 documents: expected one Pod"},
		{asYAML + "---\n{}\n---\n[]", "it holds 3 documents"},
		{"kind: Pod\nkind: Pod", `expected a Pod as YAML or JSON: yaml: unmarshal errors: line 2: key "kind" already set in map`},
		{"---\nkind: Pod\n---\na: b\na: b", `line 5: key "a" already set in map`},
		{`{"metadata":{"annotations":{"a":"1","a":"2"}}}`, "key metadata.annotations.a is given twice: expected it once"},
		{`{"spec":{"containers":[{},{"name":"a","name":"b"}]}}`, "key spec.containers[1].name is given twice"},
		{`{"a":1}` + "\n" + `{"a":1}`, "it holds 2 documents"},
		{"---\n" + `{"a":1} x`, "expected a Pod as YAML or JSON: invalid character 'x'"},
		{`{"kind":"Pod"`, "expected a Pod as YAML or JSON: unexpected EOF"},
		{"spec: {containers: [{name: a}]}\n...\nspec: {containers: [{name: b}]}", "it holds 2 documents"},
		{"a: b: c", "expected a Pod as YAML or JSON"},
		{"\tkind: Pod", "expected a Pod as YAML or JSON"},
		{"kind: List\nitems: []", "it is a list of 0 objects: expected one Pod"},
		{"kind: List\nitems: [{metadata: {name: a}}, {metadata: {name: b}}]", "it is a list of 2 objects (a, b): expected one Pod"},
		{"kind: List\nitems: [{},{},{},{},{},{},{},{},{},{},{}]", "it is a list of 11 objects (one without a name, one"},
		{"kind: List\nitems: [{kind: Service, spec: {}}]", `the object is of kind "Service", not Pod`},
		{"kind: Deployment\nspec: {template: {spec: {containers: [{name: a}]}}}", "it is a Deployment, which holds a template of pods: expected a Pod, as `kubectl get pod NAME -o yaml` gives it"},
		{"kind: CronJob\nspec: {jobTemplate: {}}", "it is a CronJob"},
		{"spec: {template: {}}", "it is a object without a kind"},
		{"kind: Service\nspec: {}", `the object is of kind "Service", not Pod`},
		{"kind: Pod\nspec: {}", "no spec.containers"},
		{"a pod", "the document: string is not an object"},
		{"[1]", "the document: array is not an object"},
		{"metadata: {annotations: {x: 8080}}\nspec: {containers: [{name: a}]}", "metadata.annotations: number is not a string: a number, true or false has to stand in quotes"},
		{"spec: {hostNetwork: 1, containers: [{name: a}]}", "spec.hostNetwork: number is not true or false"},
		{"spec: {containers: {name: a}}", "spec.containers: object is not a list"},
		{"spec: {containers: [{name: a}], securityContext: {runAsUser: a}}", "spec.securityContext.runAsUser: string is not a whole number"},
		{"spec: {containers: [{name: a}]}\nstatus: {podIP: 10.0.0}", `status.podIPs: "10.0.0": expected an IP address`},
		{"x: " + strings.Repeat("a", maxSize), "it is longer than 4 MiB"},
	} {
		f, err := Read(strings.NewReader(tc.in))
		if err == nil {
			t.Errorf("%.60q: got %+v, want an error", tc.in, f)
		} else if got := err.Error(); !strings.Contains(got, tc.want) || strings.Contains(got, "\n") {
			t.Errorf("%.60q:\n got %q\nwant %q", tc.in, got, tc.want)
		}
	}
	broken := errors.New("broken")
	if _, err := Read(iotest.ErrReader(broken)); !errors.Is(err, broken) {
		t.Errorf("a reader that fails: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{asYAML, asJSON, "---\n--- a\n---", `{"a":{"b":[{}]}}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := Parse(data)
		if (file == nil) == (err == nil) {
			t.Errorf("%+v, %v", file, err)
		}
		if err == nil && len(file.Pod.Containers) == 0 {
			t.Error("a pod without containers")
		}
	})
}
