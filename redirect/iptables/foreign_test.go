// SPDX-License-Identifier: Apache-2.0

//go:build linux

package iptables

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/testbed"
)

func TestRedirecting(t *testing.T) {
	got := redirecting(`*nat
:PREROUTING ACCEPT [0:0]
:ISTIO_REDIRECT - [0:0]
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A OUTPUT -p tcp -j RETURN
-A SHUNT_OUT -p tcp -j REDIRECT --to-ports 15001
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
-A ISTIO_REDIRECT -p udp -j REDIRECT --to-ports 15053
-A OTHER -d 10.0.0.1/32 -p tcp -j DNAT --to-destination 10.0.0.2
COMMIT
*mangle
-A TP -p tcp -j TPROXY --on-port 15006 --on-ip 0.0.0.0 --tproxy-mark 0x539/0xffffffff
COMMIT
`)
	if diff := cmp.Diff([]string{"ISTIO_REDIRECT", "OTHER", "TP"}, got); diff != "" {
		t.Error(diff)
	}
}

// TestPrivilegedForeign: others' rules of either family and mode are found, ours
// are not taken for them.
func TestPrivilegedForeign(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	p := testbed.NewPod(t)
	b := New(Options{RunDir: t.TempDir()})
	want := func(when string, chains ...string) {
		t.Helper()
		got, err := b.Foreign(t.Context(), p.NetnsPath())
		if diff := cmp.Diff(strings.Join(chains, ", "), strings.Join(got, ", ")); err != nil || diff != "" {
			t.Errorf("%s: %v\n%s", when, err, diff)
		}
	}
	want("nothing")
	p.Command(t, "iptables-nft", "-t", "nat", "-N", "SHUNT_OUT")
	p.Command(t, "iptables-nft", "-t", "nat", "-A", "SHUNT_OUT", "-p", "tcp", "-j", "REDIRECT", "--to-ports", "15001")
	want("ours")
	p.Command(t, "ip6tables-nft", "-t", "nat", "-N", "ISTIO_REDIRECT")
	p.Command(t, "ip6tables-nft", "-t", "nat", "-A", "ISTIO_REDIRECT", "-p", "tcp", "-j", "REDIRECT", "--to-ports", "15001")
	want("of nft", "IPv6 ISTIO_REDIRECT")
	p.Command(t, "iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", "REDIRECT", "--to-ports", "15001")
	want("of both", "IPv6 ISTIO_REDIRECT", "IPv4 OUTPUT")
}

// TestReadyForeignDir: what a runDir says that others can write to is not gone by,
// and nothing is written there: STATUS fails where ADD would.
func TestReadyForeignDir(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := New(Options{RunDir: dir}).Ready(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "runDir: "+dir) {
		t.Errorf("got error %v, want one that names runDir", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("in it are %v, %v", entries, err)
	}
}
