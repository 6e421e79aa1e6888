// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"shunt.dev/shunt/loader"
)

func TestPrintUpgraded(t *testing.T) {
	id := loader.ID{ContainerID: "c", IfName: "eth0"}
	for _, c := range []struct {
		done loader.Upgraded
		want string
	}{
		{loader.Upgraded{}, "no pod has got other programs\n"},
		{loader.Upgraded{Moved: []loader.ID{id}}, "1 pod has this build's programs now\n"},
		{
			loader.Upgraded{
				Moved: []loader.ID{id, id},
				Kept:  []loader.Kept{{ID: id, Pod: loader.PodRef{Namespace: "shop", Name: "a"}, Build: "datapath-old", Why: errors.New("its maps differ")}},
			},
			"2 pods have this build's programs now\nkeeps datapath-old: pod shop/a, attachment c@eth0: its maps differ\n",
		},
	} {
		var out bytes.Buffer
		if err := printUpgraded(&out, &c.done); err != nil || out.String() != c.want {
			t.Errorf("%+v: %q, %v; want %q", c.done, out.String(), err, c.want)
		}
	}
}

// On a node without a datapath there is nothing to do, and nothing is made.
func TestUpgradeOfNothing(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "conf")
	text := fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "n", "type": "shunt-cni", "bpfDir": %q, "runDir": %q}`, dir+"/bpf", dir+"/run")
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		exit int
		says string
	}{
		{[]string{"upgrade", "--netconf", conf}, 0, "no pod has got other programs"},
		{[]string{"upgrade", "--netconf", conf, "--log-level", "loud"}, exitUsage, `--log-level "loud"`},
		{[]string{"upgrade", "--netconf", dir + "/none"}, exitUsage, "none"},
		{[]string{"upgrade", "now"}, exitUsage, "now"},
	} {
		var out bytes.Buffer
		if exit := run(t.Context(), c.args, strings.NewReader(""), &out, &out); exit != c.exit || !strings.Contains(out.String(), c.says) {
			t.Errorf("%v: status %d, %q; want %d, %q", c.args, exit, out.String(), c.exit, c.says)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("made: %v, %v", left, err)
	}
}
