// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"shunt.dev/shunt/internal/testbed"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// TestSmall: what makes a process slow to start is in the larger executable alone.
func TestSmall(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range strings.FieldsSeq(string(out)) {
		for _, large := range []string{
			"net/http", "crypto", "os/exec", "os/user", "html", "text/template", "testing",
			"github.com/cilium/ebpf", "sigs.k8s.io", "k8s.io", "go.yaml.in", "github.com/spf13", "google.golang.org",
			"shunt.dev/shunt/bpf/object", "shunt.dev/shunt/internal/kubeapi", "shunt.dev/shunt/redirect/backends",
		} {
			if pkg == large || strings.HasPrefix(pkg, large+"/") {
				t.Errorf("the small executable has %s", pkg)
			}
		}
	}
	if !slices.Contains(strings.Fields(string(out)), "shunt.dev/shunt/redirect/ebpf") {
		t.Error("what was listed is not the plugin")
	}
}
