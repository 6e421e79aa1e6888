// SPDX-License-Identifier: Apache-2.0

package validate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/redirect"
)

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func TestPlan(t *testing.T) {
	const (
		ranges  = "traffic.sidecar.istio.io/includeOutboundIPRanges"
		exclude = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
		ports   = "traffic.sidecar.istio.io/excludeOutboundPorts"
	)
	dual := addrs("10.244.0.10", "fd10::10")
	for _, tc := range []struct {
		name        string
		annotations map[string]string
		addrs       []netip.Addr
		uid, gid    uint32
		to          []netip.AddrPort
		want        []string
	}{
		{name: "the proxy", addrs: dual, uid: 1337, gid: 1337, want: []string{
			"IPv4 to itself, 10.244.0.10:15002 at 127.0.0.1:15006", "IPv6 to itself, [fd10::10]:15002 at [::1]:15006",
			"other: IPv4 outbound", "other: IPv6 outbound",
		}},
		{name: "the proxy's uid with another gid", addrs: dual[:1], uid: 1337, gid: 1, want: []string{"IPv4 to itself, 10.244.0.10:15002 at 127.0.0.1:15006", "other: IPv4 outbound"}},
		{name: "an app", addrs: dual, uid: 1000, gid: 1000, want: []string{
			"IPv4 outbound, 192.0.2.1:15002 at 127.0.0.1:15001", "IPv6 outbound, [2001:db8::1]:15002 at [::1]:15001",
			"other: IPv4 to itself", "other: IPv6 to itself",
		}},
		{name: "the proxy's gid alone", addrs: dual[1:], uid: 1000, gid: 1337, want: []string{"other: IPv6 to itself", "other: IPv6 outbound"}},
		{name: "no address", uid: 1000, gid: 1000},
		{
			name: "ports that are let alone", addrs: dual, uid: 1000, gid: 1000, annotations: map[string]string{ports: "15000-15100,9"},
			want: []string{
				"IPv4 outbound, 192.0.2.1:443 at 127.0.0.1:15001", "IPv6 outbound, [2001:db8::1]:443 at [::1]:15001",
				"other: IPv4 to itself", "other: IPv6 to itself",
			},
		},
		{
			name: "ports that are let alone, to itself", addrs: dual[:1], uid: 1337, gid: 1337, annotations: map[string]string{ports: "15000-15100"},
			want: []string{"IPv4 to itself, 10.244.0.10:9 at 127.0.0.1:15006", "other: IPv4 outbound"},
		},
		{
			name: "addresses that are let alone", addrs: dual[:1], uid: 1000, gid: 1000, annotations: map[string]string{exclude: "192.0.0.0/8"},
			want: []string{"IPv4 outbound, 198.51.100.1:15002 at 127.0.0.1:15001", "other: IPv4 to itself"},
		},
		{
			name: "nobody's addresses are let alone", addrs: dual[:1], uid: 1000, gid: 1000, annotations: map[string]string{ranges: "10.96.0.0/12"},
			want: []string{"other: IPv4 to itself", "policy: IPv4 outbound"},
		},
		{
			name: "another destination", addrs: dual[:1], uid: 1000, gid: 1000, annotations: map[string]string{ranges: "10.96.0.0/12"},
			to:   []netip.AddrPort{netip.MustParseAddrPort("10.96.0.1:443")},
			want: []string{"IPv4 outbound, 10.96.0.1:443 at 127.0.0.1:15001", "other: IPv4 to itself"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, err := Policy(redirect.DefaultConfig().Proxy, tc.annotations)
			if err != nil {
				t.Fatal(err)
			}
			checks, gaps := Plan(p, tc.addrs, tc.uid, tc.gid, tc.to)
			var got []string
			for _, c := range checks {
				got = append(got, fmt.Sprintf("%v at %v", c, c.At))
			}
			for _, g := range gaps {
				by := map[bool]string{true: "other", false: "policy"}[g.Other]
				got = append(got, fmt.Sprintf("%s: %s %s", by, g.Family, g.Side))
				if g.Reason == "" {
					t.Errorf("no reason: %+v", g)
				}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestPolicy(t *testing.T) {
	proxy := redirect.DefaultConfig().Proxy
	var alone *LeftAloneError
	if _, err := Policy(proxy, map[string]string{"sidecar.istio.io/interceptionMode": "NONE"}); !errors.As(err, &alone) {
		t.Errorf("a pod that is left alone: %v", err)
	}
	var input *redirect.InputError
	if _, err := Policy(proxy, map[string]string{"traffic.sidecar.istio.io/excludeOutboundPorts": "x"}); !errors.As(err, &input) {
		t.Errorf("a bad annotation: %v", err)
	}
	proxy.UID, proxy.OutboundPort = 2000, 16001
	p, err := Policy(proxy, nil)
	if err != nil || p.Proxy.UID != 2000 || p.Proxy.OutboundPort != 16001 {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestParseAnnotations(t *testing.T) {
	got, err := ParseAnnotations([]byte("a.b/c=\"x, \\\"y\\\"\\n\"\n\nempty=\"\"\n"))
	if diff := cmp.Diff(map[string]string{"a.b/c": "x, \"y\"\n", "empty": ""}, got); diff != "" || err != nil {
		t.Errorf("%v\n%s", err, diff)
	}
	for _, bad := range []string{"a", "a=b", "=\"x\"", "a=\"b\"\nc=\"d"} {
		if got, err := ParseAnnotations([]byte(bad)); err == nil {
			t.Errorf("%q gives %v", bad, got)
		}
	}
}

func FuzzParseAnnotations(f *testing.F) {
	f.Add([]byte("a=\"b\"\nc=\"\\x00\"\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := ParseAnnotations(data)
		if err == nil {
			_, _ = Policy(redirect.DefaultConfig().Proxy, all) // must not panic
		}
	})
}

// TestRun plays the redirection by connections that need none: on loopback, to
// the listener itself.
func TestRun(t *testing.T) {
	free := func() netip.AddrPort {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return netip.MustParseAddrPort(l.Addr().String())
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	at, nobody := free(), free()
	missing, err := Run(ctx, []Check{{Outbound, at, at}, {Outbound, nobody, at}})
	if err != nil || len(missing) != 2 {
		t.Fatalf("%v, %v", missing, err)
	}
	// Nothing keeps an original destination here.
	if !errors.Is(missing[0].Err, syscall.ENOPROTOOPT) && !errors.Is(missing[0].Err, syscall.ENOENT) {
		t.Errorf("a connection that was not redirected: %v", missing[0].Err)
	}
	if text := Text(missing); !strings.Contains(text, fmt.Sprintf("IPv4 outbound, %v: connect: connection refused", nobody)) {
		t.Errorf("text %q", text)
	}

	l, err := net.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var cant *CantListenError
	if _, err := Run(ctx, []Check{{Outbound, at, at}}); !errors.As(err, &cant) || !strings.Contains(err.Error(), "is the proxy running already?") {
		t.Errorf("a port that is taken: %v", err)
	}
	// A listener that is not ours.
	missing, err = Run(ctx, []Check{{Outbound, at, free()}})
	if err != nil || len(missing) != 1 || !strings.Contains(missing[0].Err.Error(), "answered by another") {
		t.Errorf("a connection that another answers: %v, %v", missing, err)
	}
}

// TestOriginalDestination: a connection that arrives where it should is not
// enough.
func TestOriginalDestination(t *testing.T) {
	at, err := listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer at.close()
	to := netip.MustParseAddrPort(at.l.Addr().String())
	c := Check{Outbound, to, to}
	for _, tc := range []struct {
		dst   netip.AddrPort
		err   error
		fails string
	}{
		{dst: to},
		{dst: netip.AddrPortFrom(to.Addr(), 1), fails: "with the original destination 127.0.0.1:1"},
		{dst: netip.MustParseAddrPort("[::1]:1"), fails: "with the original destination [::1]:1"},
		{err: syscall.ENOENT, fails: "the original destination can't be had: no such file or directory"},
	} {
		at.mu.Lock()
		at.dst = func(net.Conn) (netip.AddrPort, error) { return tc.dst, tc.err }
		at.mu.Unlock()
		if err := c.once(t.Context(), at); (err != nil) != (tc.fails != "") || err != nil && !strings.Contains(err.Error(), tc.fails) {
			t.Errorf("%v, %v: %v", tc.dst, tc.err, err)
		}
	}
}
