// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"shunt.dev/shunt/internal/answer"
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

// TestPreloadAndStatus: the plugin's answer to STATUS goes before what the agent
// can tell, as long as it is fresh and by the same netconf.
func TestPreloadAndStatus(t *testing.T) {
	able := answer.Status{Able: true, Datapath: "auto", Text: "pods get iptables (no-cgroup2): none", At: time.Now()}
	not := answer.Status{Datapath: "auto", Text: "no iptables programs", At: time.Now()}
	change := func(s answer.Status, f func(*answer.Status)) *answer.Status { f(&s); return &s }
	for _, tc := range []struct {
		name  string
		found error // by the agent
		said  *answer.Status
		err   error
		ok    bool
		says  string
	}{
		{"nobody has asked", nil, nil, nil, true, "the eBPF datapath is loaded"},
		{"both can", nil, &able, nil, true, "the eBPF datapath is loaded"},
		{"the plugin can't", nil, &not, nil, false, "no pod can be set up, as the plugin answers STATUS: no iptables programs"},
		{"neither can", errors.New("out of memory"), &not, nil, false, "no iptables programs"},
		{"the plugin can", errors.New("out of memory"), &able, nil, true, "pods get iptables (no-cgroup2): none, as the plugin answers STATUS (in the agent: the eBPF datapath could not be loaded: out of memory)"},
		{"long ago", nil, change(not, func(s *answer.Status) { s.At = s.At.Add(-answer.Fresh) }), nil, true, "the eBPF datapath is loaded"},
		{"by another netconf", nil, change(not, func(s *answer.Status) { s.Datapath = "ebpf" }), nil, true, "the eBPF datapath is loaded"},
		{"it can't be read", nil, nil, errors.New("half an answer"), true, "the eBPF datapath is loaded (half an answer)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &config{Config: netconf.Default()}
			p := newPreloader(&configFile{now: c}, t.TempDir(), logTo(new(bytes.Buffer)))
			p.ready = func(context.Context, *config) error { return tc.found }
			p.said = func() (*answer.Status, error) { return tc.said, tc.err }
			p.try(t.Context(), c)
			if ok, says := p.condition(); ok != tc.ok || !strings.Contains(says, tc.says) {
				t.Errorf("%v, %s", ok, says)
			}
		})
	}
}
