// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"shunt.dev/shunt/internal/testbed"
)

// public copies the command to where every user may execute it.
func (n *node) public(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(n.shunt)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "shunt")
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestPrivilegedValidate: the init container's check, on every backend, by
// either user, before and after, and with a family that was lost.
func TestPrivilegedValidate(t *testing.T) {
	for name, keys := range map[string]map[string]any{
		"ebpf":            {"datapath": "ebpf"},
		"ebpf-tc":         {"datapath": "ebpf", "inboundHook": "tc"},
		"iptables-nft":    {"datapath": "iptables", "iptablesBackend": "nft"},
		"iptables-legacy": {"datapath": "iptables", "iptablesBackend": "legacy"},
	} {
		t.Run(name, func(t *testing.T) {
			testbed.Privileged(t)
			testbed.NoLeaks(t)
			shunt, err := built()
			if err != nil {
				t.Fatal(err)
			}
			p := testbed.NewPod(t)
			n := &node{shunt: shunt, dir: t.TempDir(), bpfDir: testbed.BPFFS(t) + "/shunt", cgroupRoot: p.CgroupRoot()}
			conf := map[string]any{"type": "shunt-cni", "runDir": n.dir + "/run", "bpfDir": n.bpfDir, "cgroupRoot": n.cgroupRoot}
			for k, v := range keys {
				conf[k] = v
			}
			data, err := json.Marshal(conf)
			if err != nil {
				t.Fatal(err)
			}
			on := []string{"--netns", p.NetnsPath(), "--netconf", n.file(t, "netconf", data), "--pod", n.file(t, "pod.json", p.Injected())}
			public := n.public(t)
			validate := func(uid, gid, exit int, text string, more ...string) string {
				t.Helper()
				proc := p.Start(t, testbed.ProcessSpec{
					Argv: append([]string{public, "validate"}, more...), UID: uid, GID: gid, Container: "istio-validation",
					Env: []string{"GORACE=atexit_sleep_ms=0"},
				})
				got := proc.Wait(t)
				if out := proc.Output(); got != exit || !strings.Contains(out, text) {
					t.Errorf("as %d:%d: exit status %d, want %d and %q\n%s", uid, gid, got, exit, text, out)
				}
				return proc.Output()
			}
			own := p.Addr4().String()

			// What gets out has a hop limit of 1, and there is something.
			p.World.Command(t, "iptables", "-A", "INPUT", "-d", "192.0.2.1", "-m", "ttl", "--ttl-gt", "1", "-m", "comment", "--comment", "far")
			p.World.Command(t, "iptables", "-A", "INPUT", "-d", "192.0.2.1", "-m", "ttl", "--ttl-eq", "1", "-m", "comment", "--comment", "near")
			out := validate(testbed.AppUID, testbed.AppGID, exitMissing, "shunt: traffic is not redirected: IPv4 outbound, 192.0.2.1:15002: ", "--timeout=1s")
			if !strings.Contains(out, "IPv6 outbound, [2001:db8::1]:15002: ") || strings.Count(out, "shunt: ") != 1 {
				t.Errorf("not one line that says both families:\n%s", out)
			}
			for line := range strings.Lines(p.World.Command(t, "iptables", "-L", "INPUT", "-v", "-n", "-x")) {
				if f := strings.Fields(line); strings.Contains(line, "far") && f[0] != "0" || strings.Contains(line, "near") && f[0] == "0" {
					t.Errorf("packets by hop limit: %s", line)
				}
			}
			validate(testbed.ProxyUID, testbed.ProxyGID, exitMissing, "IPv4 to itself, "+own+":15002: connect: connection refused", "--timeout=500ms")
			// Somebody out there answers: that is no redirection.
			p.World.ServeAll(t)
			validate(testbed.AppUID, testbed.AppGID, exitMissing, "it is answered by another than 127.0.0.1:15001", "--timeout=500ms")

			n.want(t, 0, "is redirected", append([]string{"apply"}, on...)...)
			validate(testbed.AppUID, testbed.AppGID, 0, "checked      IPv6 outbound   [2001:db8::1]:15002 arrives at [::1]:15001")
			validate(testbed.ProxyUID, testbed.ProxyGID, 0, "not checked  IPv4 outbound   it needs another uid than the proxy's, 1337")
			validate(testbed.ProxyUID, 4321, 0, "checked      IPv4 to itself  "+own+":15002 arrives at 127.0.0.1:15006")
			validate(4321, testbed.ProxyGID, exitUsage, "nothing can be checked as uid 4321 and gid 1337")
			var j validated
			if err := json.Unmarshal([]byte(validate(testbed.AppUID, testbed.AppGID, 0, "", "--family=4", "-o", "json")), &j); err != nil || len(j.Checked) != 1 || !j.Checked[0].Redirected || len(j.Not) != 1 {
				t.Errorf("JSON: %+v, %v", j, err)
			}
			for _, e := range examples(t) {
				if strings.HasPrefix(e.line, "shunt validate") {
					args, _ := e.args()
					e.compare(t, validate(testbed.AppUID, testbed.AppGID, 0, "", args[1:]...))
				}
			}
			// Another policy than the default, and another that lets all go.
			excluded := n.dir + "/annotations"
			if err := os.WriteFile(excluded, []byte("traffic.sidecar.istio.io/excludeOutboundPorts=\"15000-15100\"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			for _, d := range []string{n.dir, filepath.Dir(n.dir)} {
				if err := os.Chmod(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			validate(testbed.AppUID, testbed.AppGID, 0, "192.0.2.1:9 arrives", "--annotations", excluded)

			// The proxy is there already: it can't be told.
			proxy := startProxy(t, p)
			validate(testbed.ProxyUID, testbed.ProxyGID, exitFailed, "in the proxy's place: bind: address already in use: is the proxy running already?")
			proxy.Stop(t)

			// One family is lost.
			if name == "ebpf" || name == "ebpf-tc" {
				links, err := filepath.Glob(n.bpfDir + "/cgroups/*/*connect6")
				if err != nil || len(links) != 1 {
					t.Fatalf("links %q, %v", links, err)
				}
				if err := os.Remove(links[0]); err != nil {
					t.Fatal(err)
				}
				// The kernel lets go of a link in its own time.
				testbed.Eventually(t, "the end of the link", func() bool {
					return p.Start(t, testbed.ProcessSpec{
						Argv: []string{public, "validate", "--timeout=1ms", "--family=6"}, UID: testbed.ProxyUID, GID: testbed.ProxyGID, Container: "istio-validation",
					}).Wait(t) == exitMissing
				})
			} else {
				p.Command(t, map[string]string{"iptables-nft": "ip6tables-nft", "iptables-legacy": "ip6tables-legacy"}[name], "-t", "nat", "-F")
			}
			for _, id := range [][2]int{{testbed.AppUID, testbed.AppGID}, {testbed.ProxyUID, testbed.ProxyGID}} {
				out := validate(id[0], id[1], exitMissing, "traffic is not redirected: IPv6 ", "--timeout=500ms")
				if !strings.Contains(out, "checked      IPv4") && !strings.Contains(out, "checked  ") {
					t.Errorf("IPv4 as %d: %s", id[0], out)
				}
			}
			n.want(t, 0, "is redirected", append([]string{"apply"}, on...)...)
			validate(testbed.ProxyUID, testbed.ProxyGID, 0, fmt.Sprintf("checked      IPv6 to itself  [%v]:15002 arrives at [::1]:15006", p.Addr6()))
			n.want(t, 0, "removed", append([]string{"remove"}, on...)...)
			validate(testbed.ProxyUID, testbed.ProxyGID, exitMissing, "traffic is not redirected", "--timeout=500ms")
		})
	}
}
