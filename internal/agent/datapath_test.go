// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/loader"
)

// TestPreload: ready is where the datapath is loaded, or where it is known why
// pods get the other one.
func TestPreload(t *testing.T) {
	for _, tc := range []struct {
		name, datapath string
		err            error
		ok             bool
		says           string
	}{
		{"loaded", "auto", nil, true, "is loaded"},
		{"loaded, ebpf", "ebpf", nil, true, "is loaded"},
		{"iptables", "iptables", errors.New("not asked"), true, "pods get iptables: datapath iptables (netconf)"},
		{"refused", "auto", fmt.Errorf("load: %w", loader.ErrRefused), true, "pods get iptables (load-refused)"},
		{"refused, ebpf", "ebpf", fmt.Errorf("load: %w", loader.ErrRefused), false, "allows no other (load-refused)"},
		{"no bpffs", "auto", loader.ErrNoBPFFS, true, "(no-bpffs)"},
		{"another build", "auto", loader.ErrOtherBuild, true, "(other-build)"},
		{"permission", "auto", loader.ErrPermission, true, "by the agent; where the plugin can't either"},
		{"anything else", "auto", errors.New("out of memory"), false, "could not be loaded: out of memory"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			p := newPreloader(nil, t.TempDir(), logTo(&out))
			p.ready = func(context.Context, *config) error { return tc.err }
			conf := netconf.Default()
			conf.Datapath = tc.datapath
			for range 3 {
				p.try(t.Context(), &config{Config: conf})
			}
			if ok, says := p.condition(); ok != tc.ok || !strings.Contains(says, tc.says) {
				t.Errorf("%v, %s", ok, says)
			}
			if n := strings.Count(out.String(), "\n"); n != 1 {
				t.Errorf("logged %d times: %s", n, out.String())
			}
		})
	}
}
