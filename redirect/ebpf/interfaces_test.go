// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"strings"
	"testing"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/loader"
)

func TestExclude(t *testing.T) {
	const atLo, atIf = bpf.ShuntPodFlagPOD_EXCLUDE_LO, bpf.ShuntPodFlagPOD_EXCLUDE_IF
	eth0, net1 := loader.Interface{Index: 2, Name: "eth0", Up: true}, loader.Interface{Index: 3, Name: "net1", Up: true}
	tunl0, down := loader.Interface{Index: 4, Name: "tunl0"}, loader.Interface{Index: 2, Name: "eth0"}
	for _, tc := range []struct {
		name  string
		names string
		there []loader.Interface
		flags bpf.ShuntPodFlag
		iface string
		err   string // a part of it
	}{
		{"nothing", "", []loader.Interface{eth0, net1}, 0, "", ""},
		{"the only one", "eth0", []loader.Interface{eth0}, atIf, "eth0", ""},
		{"lo", "lo", []loader.Interface{eth0}, atLo, "eth0", ""},
		{"both", "eth0,lo", []loader.Interface{eth0}, atIf | atLo, "eth0", ""},
		{"the only one, down", "eth0", []loader.Interface{down}, atIf, "eth0", ""},
		{"beside what is down", "eth0", []loader.Interface{tunl0, eth0}, atIf, "eth0", ""},
		{"not there", "net1", []loader.Interface{eth0}, 0, "", "the pod has no net1 as yet, but eth0"},
		{"one of two not there", "eth0,net1", []loader.Interface{eth0}, 0, "", "the pod has no net1 as yet, but eth0"},
		{"one of several", "net1", []loader.Interface{eth0, net1}, 0, "", "the pod has eth0, net1 besides lo"},
		{"lo of several", "lo", []loader.Interface{eth0, net1}, 0, "", "the pod has eth0, net1 besides lo"},
		{"several, all down", "lo", []loader.Interface{down, tunl0}, 0, "", "the pod has eth0, tunl0 besides lo"},
		{"one that is down", "tunl0", []loader.Interface{tunl0, eth0}, 0, "", "tunl0 is down"},
		{"lo alone", "lo", nil, 0, "", "the pod has none besides lo"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var r loader.Rules
			var names []string
			if tc.names != "" {
				names = strings.Split(tc.names, ",")
			}
			err := exclude(&r, names, func() ([]loader.Interface, error) { return tc.there, nil })
			if tc.err != "" {
				if !errors.Is(err, loader.ErrInterfaces) || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("got %v, want an error with %q", err, tc.err)
				}
				return
			}
			if err != nil || r.Flags != tc.flags || r.Interface != tc.iface {
				t.Errorf("got %#x, %q, %v, want %#x, %q", r.Flags, r.Interface, err, tc.flags, tc.iface)
			}
		})
	}
	failed := errors.New("no netlink")
	if err := exclude(new(loader.Rules), []string{"lo"}, func() ([]loader.Interface, error) { return nil, failed }); !errors.Is(err, failed) {
		t.Errorf("got %v, want %v", err, failed)
	}
}
