// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"shunt.dev/shunt/internal/testbed"
)

// TestPrivilegedIptables: the plugin by the iptables datapath: where it is asked
// for, and where the pod needs what eBPF does not serve.
func TestPrivilegedIptables(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, tc := range []struct {
		name    string
		config  string // datapath
		mutator func(*testbed.KubePod)
	}{
		{"configuration", "iptables", func(*testbed.KubePod) {}},
		{"annotation", "auto", testbed.Annotate("shunt.dev/datapath", "iptables")},
		{"need", "auto", testbed.Annotate("traffic.sidecar.istio.io/excludeInterfaces", "net1")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			api := testbed.NewAPIServer(t)
			cni := testbed.NewCNI(t)
			cni.Kubeconfig = api.WriteKubeconfig(t, t.TempDir())
			cni.Config = map[string]any{"datapath": tc.config}
			w := testbed.NewWorld(t)
			w.ServeAll(t)
			p := testbed.NewPod(t, testbed.InWorld(w))
			api.SetPod(t, p.Namespace, p.Name, p.Injected(testbed.ContainerPorts(8080), tc.mutator))

			cni.MustAdd(t, p)
			cni.MustAdd(t, p) // and again
			cni.MustCheck(t, p)
			proxy, app := p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID), p.StartApp(t, 8080)
			for _, dst := range []string{"10.99.1.1:80", "[fd99::5]:80"} {
				r := app.Dial(t, dst)
				if r.Listener() != "out" || r.Served.OrigDst().Addr != netip.MustParseAddrPort(dst) {
					t.Errorf("outbound to %s: %+v", dst, r)
				}
			}
			for _, own := range []netip.Addr{p.Addr4(), p.Addr6()} {
				r := w.Dial(t, netip.AddrPortFrom(own, 8080).String())
				if r.Listener() != "in" {
					t.Errorf("inbound to %v: %+v", own, r)
				}
			}
			proxy.Stop(t)
			if r := app.Dial(t, "10.99.1.1:80"); r.Errno != "ECONNREFUSED" {
				t.Errorf("outbound without a proxy: %+v", r)
			}
			if left := glob(t, filepath.Join(cni.BPFDir, "*s", "*")); len(left) > 0 {
				t.Errorf("eBPF links: %v", left)
			}

			cni.MustDel(t, p)
			cni.MustDel(t, p, testbed.LateDel())
			for _, save := range []string{"iptables-save", "ip6tables-save"} {
				if rules := p.Command(t, save); strings.Contains(rules, "SHUNT") {
					t.Errorf("%s after DEL:\n%s", save, rules)
				}
			}
			if r := app.Dial(t, "10.99.1.1:80"); r.Listener() != "world" {
				t.Errorf("outbound after DEL: %+v", r)
			}
			if left := glob(t, filepath.Join(cni.RunDir, "iptables", "*.json")); len(left) > 0 {
				t.Errorf("records after DEL: %v", left)
			}
		})
	}
}

// TestPrivilegedOtherDatapath: an ADD by one datapath takes the other's
// programming away.
func TestPrivilegedOtherDatapath(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	api := testbed.NewAPIServer(t)
	cni := testbed.NewCNI(t)
	cni.Kubeconfig = api.WriteKubeconfig(t, t.TempDir())
	p := testbed.NewPod(t)
	p.World.ServeAll(t)
	api.SetPod(t, p.Namespace, p.Name, p.Injected())
	p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID)
	app := p.StartApp(t)
	for _, datapath := range []string{"ebpf", "iptables", "ebpf"} {
		cni.MustAdd(t, p, testbed.Set("datapath", datapath))
		cni.MustCheck(t, p)
		if r := app.Dial(t, "10.99.1.1:80"); r.Listener() != "out" {
			t.Errorf("%s: %+v", datapath, r)
		}
		rules := strings.Contains(p.Command(t, "iptables-save"), "SHUNT")
		links := len(glob(t, filepath.Join(cni.BPFDir, "netns", "*"))) > 0
		if rules != (datapath == "iptables") || links != (datapath == "ebpf") {
			t.Errorf("%s: rules %v, links %v", datapath, rules, links)
		}
	}
	cni.MustDel(t, p)
}
