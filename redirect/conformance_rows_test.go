// SPDX-License-Identifier: Apache-2.0

//go:build linux

package redirect_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/flowgen"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/iptables"
)

// Who acts, in short.
const (
	app   = flowgen.ByApp
	proxy = flowgen.ByProxy
	uidOf = flowgen.ByUIDOnly
	gidOf = flowgen.ByGIDOnly
	world = flowgen.ByWorld
)

// The keys of the setups.
const (
	keyMode              = "sidecar.istio.io/interceptionMode"
	keyIncludeRanges     = "traffic.sidecar.istio.io/includeOutboundIPRanges"
	keyExcludeRanges     = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
	keyIncludePorts      = "traffic.sidecar.istio.io/includeOutboundPorts"
	keyIncludeInbound    = "traffic.sidecar.istio.io/includeInboundPorts"
	keyExcludeInbound    = "traffic.sidecar.istio.io/excludeInboundPorts"
	keyExcludeInterfaces = "traffic.sidecar.istio.io/excludeInterfaces"
	keyReroute           = "istio.io/reroute-virtual-interfaces"
)

var captured = testbed.ProxyEnv(envDNSCapture, "true")

// net1 is a second interface, and networks that go by it. Each pod needs
// addresses of its own.
func net1(addrs ...string) []testbed.Option {
	return []testbed.Option{testbed.Interface("net1", addrs, []string{"10.77.0.0/16", "fd77::/16"})}
}

// setups are the policies of the rows. "bare" has no annotation: what the others
// exclude or include shows by what becomes of the same flow there.
var setups = map[string]setup{
	"bare": {prepare: func(t testing.TB, p *testbed.Pod) { p.EnablePing(t) }},
	"lists": {
		mutators: []testbed.PodMutator{
			testbed.Annotate(keyIncludeRanges, "10.96.0.0/12,fd96::/16"),
			testbed.Annotate(keyExcludeRanges, "10.97.0.0/16,fd96:1::/32"),
			testbed.Annotate(keyIncludePorts, "9000-9009"),
			testbed.Annotate(annotExcludePort, "7000-7010"),
			testbed.Annotate(keyIncludeInbound, "*"),
			testbed.Annotate(keyExcludeInbound, "8081"),
		},
		proxy:   []testbed.ProxyOption{testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.FastOpen = 128 })},
		prepare: func(t testing.TB, p *testbed.Pod) { p.EnableFastOpen(t) },
	},
	// An include within loopback takes the rules for what is local away.
	"loopback": {mutators: []testbed.PodMutator{
		testbed.Annotate(keyIncludeRanges, "127.0.0.8/29,::1/128,10.244.0.0/16,fd10::/16"),
		testbed.Annotate(keyIncludeInbound, "8080,8090-8099"),
	}},
	"dns":                {mutators: []testbed.PodMutator{captured, testbed.Annotate(keyExcludeRanges, "10.97.0.0/16,fd97::/16")}},
	"dns, port excluded": {mutators: []testbed.PodMutator{captured, testbed.Annotate(annotExcludePort, "53")}},
	"dns, net1 excluded": {mutators: []testbed.PodMutator{captured, testbed.Annotate(keyExcludeInterfaces, "net1")}, pod: net1("10.245.1.4", "fd11:1::4")},
	"dns, eth0 excluded": {mutators: []testbed.PodMutator{captured, testbed.Annotate(keyExcludeInterfaces, "eth0")}},
	"dns, lo excluded":   {mutators: []testbed.PodMutator{captured, testbed.Annotate(keyExcludeInterfaces, "lo")}},
	"eth0 excluded":      {mutators: []testbed.PodMutator{testbed.Annotate(keyExcludeInterfaces, "eth0")}},
	"lo excluded":        {mutators: []testbed.PodMutator{testbed.Annotate(keyExcludeInterfaces, "lo")}},
	"net1":               {pod: net1("10.245.1.5", "fd11:1::5")},
	"net1 excluded":      {mutators: []testbed.PodMutator{testbed.Annotate(keyExcludeInterfaces, "net1")}, pod: net1("10.245.1.6", "fd11:1::6")},
	"net1 rerouted": {
		mutators: []testbed.PodMutator{testbed.Annotate(keyReroute, "net1"), testbed.Annotate(keyIncludeRanges, "10.245.2.0/24,fd11:2::/32,10.88.0.0/16,fd88::/16")},
		pod:      net1("10.245.2.7", "10.245.3.7", "fd11:2::7", "fd11:3::7"),
	},
	"tproxy": {
		mutators: []testbed.PodMutator{testbed.Annotate(keyMode, "TPROXY"), testbed.Annotate(keyIncludeInbound, "*"), testbed.Annotate(keyExcludeInbound, "8081")},
		proxy:    []testbed.ProxyOption{withNetAdmin, testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.Transparent = l.Name == "in" })},
	},
	"tproxy, not transparent": {
		mutators: []testbed.PodMutator{testbed.Annotate(keyMode, "TPROXY"), testbed.Annotate(keyIncludeInbound, "*")},
		proxy:    []testbed.ProxyOption{withNetAdmin},
	},
	"users": {mutators: []testbed.PodMutator{testbed.HostUsers(false)}, users: 100000},
	// In these the rows see to the proxy's listeners.
	"alone":           {mutators: includeAll, proxy: noListeners},
	"SYN cookies":     {mutators: includeAll, proxy: noListeners, pod: []testbed.Option{testbed.Sysctl("net.ipv4.tcp_syncookies", "2")}},
	"no IPv6":         {pod: []testbed.Option{testbed.NoIPv6()}},
	"time-wait":       {mutators: includeAll, proxy: closeFirst},
	"time-wait, kept": {mutators: includeAll, proxy: closeFirst, pod: []testbed.Option{testbed.Sysctl("net.ipv4.tcp_rfc1337", "1")}},
}

var (
	includeAll  = []testbed.PodMutator{testbed.Annotate(keyIncludeInbound, "*"), testbed.Annotate(keyExcludeInbound, "8081")}
	noListeners = []testbed.ProxyOption{testbed.ProxyPorts(0, 0)}
	closeFirst  = []testbed.ProxyOption{testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.CloseFirst = true })}
)

// Destinations that go to the proxy, and those that don't, in "lists".
const (
	included = "10.96.0.1:80 [fd96::1]:80"
	excluded = "10.97.0.1:80 [fd96:1::1]:80"
	own      = "A4:8080 [A6]:8080"
	own1     = "A4:8081 [A6]:8081"
	lo       = "127.0.0.1:8080 [::1]:8080"
	loSource = "127.0.0.1 ::1"
)

// in plays flows in the pod of a setup.
func (h *house) in(t *testing.T, setup string, flows ...flow) {
	t.Helper()
	h.on(t, setup).try(flows...)
}

// listen opens the proxy's listeners, for as long as the row is played.
func (s *stage) listen(t *testing.T, specs ...testbed.ListenSpec) (all []*testbed.Listener) {
	t.Helper()
	for _, spec := range specs {
		l := s.proxy.Listen(t, spec)
		all = append(all, l)
	}
	return all
}

func listenIn(addr string) testbed.ListenSpec {
	return testbed.ListenSpec{Name: "in", Addr: ap(addr)}
}

func closeAll(t *testing.T, listeners []*testbed.Listener) {
	t.Helper()
	for _, l := range listeners {
		l.CloseAll(t)
	}
}

// lawRows are in the order of the document.
var lawRows = []lawRow{
	{section: 3, what: "owner: ids of the pod's user namespace", quote: `"owner" = what iptables' owner match sees`, setup: "users", play: func(t *testing.T, h *house) {
		s := h.on(t, "users")
		to := "10.99.1.1:80 [fd99::5]:80"
		s.actors["stranger"] = s.Actor(h.parent, "stranger", testbed.ProxyUID, testbed.ProxyGID) // as numbered here
		for by, goes := range map[string]string{app: "out", "stranger": "out", proxy: "world", uidOf: "world", gidOf: "world"} {
			s.try(flow{by: by, to: to, goes: goes})
		}
		s.try(flow{by: proxy, to: own, goes: "in"}, flow{by: world, to: own, goes: "in"})
	}},
	{section: 3, what: "owner: fsuid and fsgid of the creator", quote: `"owner" = what iptables' owner match sees`, setup: "lists", play: playOwners},

	{section: 4, rule: redirect.RuleOutExcludeInterface, setup: "eth0 excluded", play: func(t *testing.T, h *house) {
		f := flow{by: app, to: "10.77.0.1:80 [fd77::1]:80", iface: "eth0"}
		self := flow{by: proxy, to: own}
		h.in(t, "eth0 excluded", f.with("world", redirect.RuleOutExcludeInterface), self.with("in", redirect.RuleOutProxyToSelf))
		h.in(t, "lo excluded", f.with("out", redirect.RuleOutIncludeCIDR), self.with("app", redirect.RuleOutExcludeInterface))
		h.in(t, "bare", f.with("out", redirect.RuleOutIncludeCIDR), self.with("in", redirect.RuleOutProxyToSelf))
		if !h.can.Interfaces {
			h.note(noteOne)
			return
		}
		f.from, f.iface = "N4 N6", "net1"
		h.in(t, "net1 excluded", f.with("world", redirect.RuleOutExcludeInterface), flow{by: app, to: "10.99.0.9:80 [fd99::9]:80", goes: "out"})
		h.in(t, "net1", f.with("out", redirect.RuleOutIncludeCIDR))
	}},
	{section: 4, rule: redirect.RuleOutExcludePort, setup: "lists", play: func(t *testing.T, h *house) {
		f := flow{by: app, to: "10.96.0.1:7000 [fd96::1]:7010"}
		h.in(t, "lists", f.with("world", redirect.RuleOutExcludePort),
			flow{by: app, to: "10.96.0.1:6999 [fd96::1]:7011", goes: "out", rule: redirect.RuleOutIncludeCIDR})
		h.in(t, "bare", f.with("out", redirect.RuleOutIncludeCIDR))
	}},
	{section: 4, rule: redirect.RuleOutPassthrough, setup: "lists", play: func(t *testing.T, h *house) {
		f := flow{by: proxy, to: own}
		s6 := f
		s6.bind = "127.0.0.6:0 [::6]:0"
		h.in(t, "lists", s6.with("app", redirect.RuleOutPassthrough), f.with("in", redirect.RuleOutProxyToSelf))
		// Not by lo: S6 alone opens nothing.
		h.in(t, "loopback",
			flow{by: app, to: own, bind: s6.bind, goes: "app", rule: redirect.RuleOutPassthrough},
			flow{by: app, to: own, goes: "out", rule: redirect.RuleOutIncludeCIDR})
	}},
	{section: 4, rule: redirect.RuleOutProxyToSelf, setup: "lists", play: func(t *testing.T, h *house) {
		for _, by := range []string{proxy, uidOf} {
			h.in(t, "lists",
				flow{by: by, to: own, goes: "in", rule: redirect.RuleOutProxyToSelf},
				flow{by: by, to: lo, goes: "app", rule: redirect.RuleOutProxy},
				flow{by: by, to: "A4:15008 [A6]:15008", goes: "tunnel", rule: redirect.RuleOutProxy})
		}
		h.in(t, "lists",
			flow{by: proxy, to: "127.0.0.2:8080", goes: "in", rule: redirect.RuleOutProxyToSelf},
			flow{by: app, to: own, goes: "app", rule: redirect.RuleOutLocal})
		h.in(t, "dns", flow{by: proxy, to: "A4:53 [A6]:53", goes: "ECONNREFUSED", rule: redirect.RuleOutProxy})
	}},
	{section: 4, rule: redirect.RuleOutLocal, setup: "lists", play: func(t *testing.T, h *house) {
		for _, by := range []string{app, gidOf} {
			h.in(t, "lists", flow{by: by, to: own, goes: "app", rule: redirect.RuleOutLocal})
		}
		h.in(t, "lists", flow{by: app, to: lo, goes: "app", rule: redirect.RuleOutLocal})
		h.in(t, "loopback",
			flow{by: app, to: own, goes: "out", rule: redirect.RuleOutIncludeCIDR},
			flow{by: app, to: "127.0.0.9:8080", goes: "out", rule: redirect.RuleOutIncludeCIDR})
	}},
	{section: 4, rule: redirect.RuleOutProxy, setup: "lists", play: func(t *testing.T, h *house) {
		for _, by := range []string{proxy, uidOf} {
			h.in(t, "lists", flow{by: by, to: included, goes: "world", rule: redirect.RuleOutProxy})
		}
		h.in(t, "lists", flow{by: app, to: included, goes: "out", rule: redirect.RuleOutIncludeCIDR})
	}},
	{section: 4, rule: redirect.RuleOutProxyGIDToSelf, setup: "loopback", play: func(t *testing.T, h *house) {
		h.in(t, "loopback",
			flow{by: gidOf, to: own, goes: "in", rule: redirect.RuleOutProxyGIDToSelf},
			flow{by: gidOf, to: "127.0.0.2:8080", goes: "in", rule: redirect.RuleOutProxyGIDToSelf},
			flow{by: gidOf, to: lo, goes: "app", rule: redirect.RuleOutProxyGID},
			flow{by: gidOf, to: "A4:15008 [A6]:15008", goes: "tunnel", rule: redirect.RuleOutProxyGID},
			flow{by: app, to: own, goes: "out", rule: redirect.RuleOutIncludeCIDR})
	}},
	// It decides nothing: what it matches [out-local] or [out-proxy] has had. It
	// goes where that goes, and with it.
	{section: 4, rule: redirect.RuleOutProxyGIDLocal, setup: "lists", play: func(t *testing.T, h *house) {
		h.in(t, "lists",
			flow{by: app, to: own, goes: "app", rule: redirect.RuleOutLocal},
			flow{by: uidOf, to: lo, goes: "app", rule: redirect.RuleOutProxy})
		h.in(t, "loopback", flow{by: app, to: own, goes: "out", rule: redirect.RuleOutIncludeCIDR})
		for _, name := range []string{"lists", "loopback"} {
			if n := h.on(t, name).counted()[redirect.RuleOutProxyGIDLocal]; n != 0 {
				t.Errorf("it has decided %d flows", n)
			}
		}
	}},
	{section: 4, rule: redirect.RuleOutProxyGID, setup: "lists", play: func(t *testing.T, h *house) {
		h.in(t, "lists",
			flow{by: gidOf, to: included, goes: "world", rule: redirect.RuleOutProxyGID},
			flow{by: app, to: included, goes: "out", rule: redirect.RuleOutIncludeCIDR})
	}},
	{section: 4, rule: redirect.RuleOutDNS, setup: "dns", play: func(t *testing.T, h *house) {
		f := flow{by: app, to: "10.99.0.53:53 [fd99::53]:53 10.97.0.53:53 A4:53 [A6]:53"}
		h.in(t, "dns", f.with("dns", redirect.RuleOutDNS),
			flow{by: app, to: "127.0.0.53:53 [::1]:53", from: loSource, goes: "dns", rule: redirect.RuleOutDNS},
			flow{by: app, to: "10.99.0.53:54 [fd99::53]:54", goes: "out"},
			flow{by: proxy, to: f.to[:len("10.99.0.53:53")], goes: "world"})
		h.resolve(t, "dns", "glibc")
		bare := flow{by: app, to: "10.99.0.53:53 [fd99::53]:53"}
		h.in(t, "bare", bare.with("out", redirect.RuleOutIncludeCIDR))
	}},
	{section: 4, rule: redirect.RuleOutLoopback, setup: "loopback", play: func(t *testing.T, h *house) {
		h.in(t, "loopback",
			flow{by: app, to: lo, goes: "app", rule: redirect.RuleOutLoopback},
			flow{by: app, to: "127.0.0.9:8080", goes: "out", rule: redirect.RuleOutIncludeCIDR},
			flow{by: app, to: own, goes: "out", rule: redirect.RuleOutIncludeCIDR})
	}},
	{section: 4, rule: redirect.RuleOutExcludeCIDR, setup: "lists", play: func(t *testing.T, h *house) {
		f := flow{by: app, to: "10.97.0.0:80 [fd96:1::]:80 10.97.255.255:9000"}
		h.in(t, "lists", f.with("world", redirect.RuleOutExcludeCIDR),
			flow{by: app, to: "10.96.255.255:80 [fd96:0:ffff::1]:80", goes: "out", rule: redirect.RuleOutIncludeCIDR})
		h.in(t, "bare", f.with("out", redirect.RuleOutIncludeCIDR))
	}},
	{section: 4, rule: redirect.RuleOutIncludePort, setup: "lists", play: func(t *testing.T, h *house) {
		h.in(t, "lists",
			flow{by: app, to: "8.8.8.8:9000 [2001:db8::8]:9009", goes: "out", rule: redirect.RuleOutIncludePort},
			flow{by: app, to: "8.8.8.8:8999 [2001:db8::8]:9010", goes: "world", rule: redirect.RuleOutDefault})
	}},
	{section: 4, rule: redirect.RuleOutIncludeCIDR, setup: "lists", play: func(t *testing.T, h *house) {
		h.in(t, "lists",
			flow{by: app, to: "10.96.0.0:80 [fd96:2::]:80 10.111.255.255:80", goes: "out", rule: redirect.RuleOutIncludeCIDR},
			flow{by: app, to: "10.112.0.0:80 [fd97::]:80", goes: "world", rule: redirect.RuleOutDefault})
		h.in(t, "bare", flow{by: app, to: "10.112.0.0:80 [fd97::]:80", goes: "out", rule: redirect.RuleOutIncludeCIDR})
	}},
	{section: 4, rule: redirect.RuleOutDefault, setup: "lists", play: func(t *testing.T, h *house) {
		f := flow{by: app, to: "10.112.0.0:80 [fd97::]:80 10.95.255.255:8999"}
		h.in(t, "lists", f.with("world", redirect.RuleOutDefault))
		h.in(t, "bare", f.with("out", redirect.RuleOutIncludeCIDR))
	}},

	{section: 4, what: "SO_ORIGINAL_DST, both levels, no privilege", quote: "by SO_ORIGINAL_DST (level SOL_IP", setup: "bare", play: func(t *testing.T, h *house) {
		s := h.on(t, "bare")
		status := read(t, fmt.Sprintf("/proc/%d/status", s.proxy.PID))
		if !strings.Contains(status, "CapEff:\t0000000000000000\n") || s.proxy.UID == 0 {
			t.Errorf("the proxy is privileged")
		}
		s.try(
			flow{by: app, to: "10.99.1.1:80 [fd99::5]:443 10.99.1.2:81 [fd99::6]:444", goes: "out"},
			flow{by: proxy, to: own, goes: "in"},
			flow{by: proxy, to: "10.99.1.1:80 [fd99::5]:443", goes: "world"})
	}},
	{section: 4, what: "peer address at the proxy", quote: "The proxy sees the same peer address", setup: "bare", play: func(t *testing.T, h *house) {
		to := "10.99.1.1:80 [fd99::5]:80"
		s := h.on(t, "net1")
		s.try(
			flow{by: app, to: to, goes: "out"},
			flow{by: app, to: "10.77.0.1:80 [fd77::1]:80", from: "N4 N6", iface: "net1", goes: "out"},
			flow{by: app, to: to, bind: "A4:0 [A6]:0", goes: "out"},
			flow{by: app, to: to, bind: "N4:5001 [N6]:5001", goes: "out"},
			flow{by: app, to: to[strings.Index(to, "["):], bind: "[::1]:0", goes: "out"})
		loopback := flow{by: app, to: "10.99.1.1:80", bind: "127.0.0.1:0", goes: "out"}
		s.try(loopback)
		if h.can.ConnectHooks {
			h.note(noteLoopback)
		}
	}},
	{section: 4, what: "getpeername", quote: "The app's getpeername", setup: "bare", play: func(t *testing.T, h *house) {
		s := h.on(t, "bare")
		for _, dst := range []string{"10.99.1.1:80", "[fd99::5]:80"} {
			for _, by := range []string{app, proxy} {
				r := s.who(by).Connect(t, testbed.ConnectSpec{Dst: ap(dst), Keep: true})
				info := s.who(by).Info(t, r.Sock)
				s.who(by).Linger0(t, r.Sock)
				s.who(by).Close(t, r.Sock)
				if plain(r.Peer) != dst || plain(info.Peer) != dst {
					t.Errorf("%s to %s: getpeername gives %v, then %v", by, dst, r.Peer, info.Peer)
				}
				if want := map[string]string{app: "out", proxy: "world"}[by]; r.Listener() != want {
					t.Errorf("%s to %s: served by %q", by, dst, r.Listener())
				}
			}
		}
	}},
	{section: 4, what: "connect errors", quote: "Its connect errors are", setup: "alone", play: func(t *testing.T, h *house) {
		refused := flow{by: app, to: "10.99.1.1:80 [fd99::5]:80", goes: "ECONNREFUSED"}
		later := refused
		later.shape = func(s *testbed.ConnectSpec) { s.Nonblock = true }
		s := h.on(t, "alone")
		s.try(refused, later, flow{by: proxy, to: refused.to, goes: "world"})
		out := s.listen(t, testbed.ListenSpec{Name: "out", Addr: ap("[::]:15001")})
		refused.goes = "out"
		s.try(refused)
		closeAll(t, out)
		// What the kernel says of a family that the pod has not.
		six := h.on(t, "no IPv6").who(app).Dial(t, "[fd99::5]:80")
		want := "EADDRNOTAVAIL"
		if h.can.ConnectHooks {
			want = "ENETUNREACH"
			h.note(noteNoIPv6)
		}
		if six.Errno != want {
			t.Errorf("IPv6 in a pod without gives %q, want %q", six.Errno, want)
		}
	}},
	{section: 4, what: "mapped and unspecified destinations", quote: "IPv4-mapped IPv6 destinations", setup: "lists", play: func(t *testing.T, h *house) {
		h.in(t, "lists",
			flow{by: app, to: "10.96.0.1:80", mapped: true, goes: "out", rule: redirect.RuleOutIncludeCIDR},
			flow{by: app, to: "10.97.0.1:80", mapped: true, goes: "world", rule: redirect.RuleOutExcludeCIDR},
			flow{by: app, to: "0.0.0.0:8080 [::]:8080", goes: "app", rule: redirect.RuleOutLocal},
			flow{by: proxy, to: "0.0.0.0:8080 [::]:8080", goes: "app", rule: redirect.RuleOutProxy})
		h.in(t, "loopback",
			flow{by: app, to: "0.0.0.0:8080 [::]:8080", goes: "app", rule: redirect.RuleOutLoopback},
			flow{by: app, to: own, goes: "out"})
	}},
	way("non-blocking connect", func(s *testbed.ConnectSpec) { s.Nonblock = true }),
	way("MSG_FASTOPEN", func(s *testbed.ConnectSpec) { s.FastOpen, s.Data = true, "hello" }),
	way("io_uring", func(s *testbed.ConnectSpec) { s.IOURing = true }),
	way("MPTCP", func(s *testbed.ConnectSpec) { s.MPTCP = true }),
	{section: 4, what: "sockets passed to another process", quote: waysQuote, setup: "lists", play: func(t *testing.T, h *house) {
		s := h.on(t, "lists")
		for _, dst := range strings.Fields(included) {
			for _, x := range []struct{ from, to, goes string }{{proxy, app, "world"}, {app, proxy, "out"}, {gidOf, app, "world"}} {
				sock := s.who(x.from).Socket(t, testbed.SocketSpec{Family: familyOf(ap(dst).Addr())})
				there := s.who(x.from).PassSocket(t, sock, s.who(x.to))
				s.who(x.from).Close(t, sock)
				before := s.counted()
				r := s.who(x.to).Connect(t, testbed.ConnectSpec{Sock: there, Dst: ap(dst)})
				s.expect(flow{by: x.from, goes: x.goes}, testbed.ConnectSpec{Dst: ap(dst)}, netip.Addr{}, before, r)
				s.who(x.to).Linger0(t, there)
				s.who(x.to).Close(t, there)
			}
		}
	}},
	{section: 4, what: "connect after bind", quote: waysQuote, setup: "lists", play: func(t *testing.T, h *house) {
		for _, x := range []struct{ to, goes string }{{included, "out"}, {excluded, "world"}} {
			h.in(t, "lists",
				flow{by: app, to: x.to, bind: "A4:0 [A6]:0", goes: x.goes},
				flow{by: app, to: x.to, bind: "A4:5011 [A6]:5011", goes: x.goes},
				flow{by: app, to: x.to, bind: "0.0.0.0:5012 [::]:5012", goes: x.goes},
				flow{by: app, to: x.to, bind: "0.0.0.0:0 [::]:0", goes: x.goes})
		}
	}},
	{section: 4, what: "connect(AF_UNSPEC), connect again", quote: waysQuote, setup: "lists", play: func(t *testing.T, h *house) {
		s := h.on(t, "lists")
		for i, first := range strings.Fields(included) {
			local := strings.Fields(own)[i]
			sock := s.who(app).Socket(t, testbed.SocketSpec{Family: familyOf(ap(first).Addr())})
			for _, x := range []struct{ to, goes string }{{first, "out"}, {strings.Fields(excluded)[i], "world"}, {first, "out"}, {local, "app"}, {first, "out"}} {
				spec := testbed.ConnectSpec{Sock: sock, Dst: s.expand(x.to)}
				before := s.counted()
				r := s.who(app).Connect(t, spec)
				s.expect(flow{by: app, goes: x.goes}, spec, netip.Addr{}, before, r)
				s.who(app).Linger0(t, sock)
				if errno := s.who(app).Disconnect(t, sock); errno != "" {
					t.Errorf("disconnect: %s", errno)
				}
			}
			s.who(app).Close(t, sock)
		}
	}},
	{section: 4, what: "other UDP and ICMP", quote: "UDP other than captured DNS, ICMP", setup: "bare", play: func(t *testing.T, h *house) {
		h.resolve(t, "bare", "UDP, not captured")
		s := h.on(t, "bare")
		for _, dst := range []string{"10.99.1.1", "fd99::5"} {
			if got, want := ping(t, s.who(app), netip.MustParseAddr(dst)), "echoed by "+dst; got != want {
				t.Errorf("ping %s: %s", dst, got)
			}
		}
		// TCP to there does not go untouched.
		s.try(flow{by: app, to: "10.99.1.1:53 [fd99::5]:53", goes: "out"})
	}},
	{section: 4, what: "DNS over UDP, connected or not, in batches", quote: "Captured DNS over UDP", setup: "dns", play: func(t *testing.T, h *house) {
		h.resolve(t, "dns", "glibc", "glibc, the next server", "connected, then not", "many at once", "captured, and not, by one socket")
	}},
	{section: 4, what: "DNS replies bear the resolver's address", quote: "the app sees replies come from the resolver it asked", setup: "dns", play: func(t *testing.T, h *house) {
		h.resolve(t, "dns", "musl", "musl, by a socket for both families", "one socket, several resolvers in turn")
	}},
	{section: 4, what: "the rules for UDP port 53", quote: "For UDP port 53 the rules that apply", setup: "dns", play: func(t *testing.T, h *house) {
		h.resolve(t, "dns", "the proxy's own", "of the proxy's group alone", "from S6", "an excluded CIDR")
		h.resolve(t, "dns, port excluded", "port 53 excluded")
	}},
	{section: 4, what: "UDP port 53 by an excluded interface", quote: "For UDP port 53 the rules that apply", setup: "dns, eth0 excluded", play: func(t *testing.T, h *house) {
		h.resolve(t, "dns, eth0 excluded", "eth0 excluded")
		h.resolve(t, "dns, lo excluded", "lo excluded")
		if !h.can.Interfaces {
			h.note(noteOne)
			return
		}
		h.resolve(t, "dns, net1 excluded", "net1 excluded")
	}},

	{section: 5, rule: redirect.RuleInReroute, setup: "net1 rerouted", play: func(t *testing.T, h *house) {
		s := h.on(t, "net1 rerouted")
		s.try(
			flow{by: world, to: "10.245.2.7:8080 [fd11:2::7]:8080", iface: "net1", goes: "out", rule: redirect.RuleInReroute},
			flow{by: world, to: "10.245.3.7:8080 [fd11:3::7]:8080", iface: "net1", goes: "app", rule: redirect.RuleInReroute},
			flow{by: world, to: own, goes: "in", rule: redirect.RuleInInclude})
		// What a virtual machine asks for is elsewhere.
		s.lead(t, "10.88.0.1", "fd88::1")
		s.try(flow{by: world, to: "10.88.0.1:80 [fd88::1]:80", iface: "net1", goes: "out", rule: redirect.RuleInReroute})
		h.in(t, "net1", flow{by: world, to: "N4:8080 [N6]:8080", iface: "net1", goes: "in", rule: redirect.RuleInInclude})
	}},
	{section: 5, rule: redirect.RuleInExcludeInterface, setup: "eth0 excluded", play: func(t *testing.T, h *house) {
		direct, taken := flow{by: world, to: own, goes: "app", rule: redirect.RuleInExcludeInterface}, flow{by: world, to: own, goes: "in", rule: redirect.RuleInInclude}
		h.in(t, "eth0 excluded", direct)
		h.in(t, "lo excluded", taken)
		h.in(t, "bare", taken)
		if !h.can.Interfaces {
			h.note(noteOne)
			return
		}
		f := flow{by: world, to: "N4:8080 [N6]:8080", iface: "net1"}
		h.in(t, "net1 excluded", f.with("app", redirect.RuleInExcludeInterface), flow{by: world, to: own, goes: "in", rule: redirect.RuleInInclude})
		h.in(t, "net1", f.with("in", redirect.RuleInInclude))
	}},
	{section: 5, rule: redirect.RuleInTunnel, setup: "lists", play: func(t *testing.T, h *house) {
		h.in(t, "lists",
			flow{by: world, to: "A4:15008 [A6]:15008", goes: "tunnel", rule: redirect.RuleInTunnel},
			flow{by: world, to: "A4:15007 [A6]:15009", goes: "in", rule: redirect.RuleInInclude})
	}},
	{section: 5, rule: redirect.RuleInExcludePort, setup: "lists", play: func(t *testing.T, h *house) {
		h.in(t, "lists",
			flow{by: world, to: own1, goes: "app", rule: redirect.RuleInExcludePort},
			flow{by: world, to: "A4:15021 [A6]:15090", goes: "ECONNREFUSED", rule: redirect.RuleInExcludePort},
			flow{by: world, to: own, goes: "in", rule: redirect.RuleInInclude})
	}},
	{section: 5, rule: redirect.RuleInInclude, setup: "loopback", play: func(t *testing.T, h *house) {
		h.in(t, "loopback",
			flow{by: world, to: "A4:8080 [A6]:8080 A4:8090 [A6]:8099", goes: "in", rule: redirect.RuleInInclude},
			flow{by: world, to: own1, goes: "app", rule: redirect.RuleInDefault})
		h.in(t, "lists", flow{by: world, to: "A4:1 [A6]:65535", goes: "in", rule: redirect.RuleInInclude})
	}},
	{section: 5, rule: redirect.RuleInDefault, setup: "bare", play: func(t *testing.T, h *house) {
		h.in(t, "bare",
			flow{by: world, to: own1, goes: "app", rule: redirect.RuleInDefault},
			flow{by: world, to: own, goes: "in", rule: redirect.RuleInInclude})
	}},

	{section: 5, what: "original destination, client's address", quote: "the client's address is what arrived", setup: "lists", play: func(t *testing.T, h *house) {
		for _, bind := range []string{"203.0.113.7:0 [2001:db8::7]:0", "192.0.2.8:4008 [2001:db8::8]:4008"} {
			h.in(t, "lists",
				flow{by: world, to: "A4:8080 [A6]:8082", bind: bind, goes: "in"},
				flow{by: world, to: own1, bind: bind, goes: "app"})
		}
	}},
	{section: 5, what: "no listener: refused at once", quote: "No listener on IN that REDIRECT would reach", setup: "alone", play: func(t *testing.T, h *house) { h.on(t, "alone").refuses(t) }},
	{section: 5, what: "nor by SYN cookies", quote: "SYN cookies, fragments", setup: "SYN cookies", play: func(t *testing.T, h *house) { h.on(t, "SYN cookies").refuses(t) }},
	{section: 5, what: "nor by IP options, extension headers", quote: "extension headers or IP options", setup: "alone", play: func(t *testing.T, h *house) {
		s := h.on(t, "alone")
		s.withOptions(t, "refused", "app")
		in := s.listen(t, listenIn("[::]:15006"))
		s.withOptions(t, "in", "app")
		closeAll(t, in)
	}},
	{section: 5, what: "nor by fragments", quote: "SYN cookies, fragments", setup: "alone", play: func(t *testing.T, h *house) {
		s := h.on(t, "alone")
		s.inFragments(t, "refused", "app")
		in := s.listen(t, listenIn("[::]:15006"))
		s.inFragments(t, "in", "app")
		closeAll(t, in)
	}},
	{section: 5, what: "source port reused in TIME_WAIT", quote: "in TIME_WAIT at the proxy", setup: "time-wait", play: playTimeWait},
	{section: 5, what: "SO_REUSEPORT workers", quote: "balanced as the kernel would", setup: "alone", play: playReusePort},
	{section: 5, what: "MPTCP listener", quote: "An MPTCP listener on IN is served", setup: "alone", play: playMPTCPListener},
	{section: 5, what: "TPROXY: both addresses", quote: "both addresses are preserved", setup: "tproxy", play: func(t *testing.T, h *house) {
		bind := "203.0.113.77:0 [2001:db8::77]:0"
		h.in(t, "tproxy",
			flow{by: world, to: own, bind: bind, goes: "in", rule: redirect.RuleInInclude},
			flow{by: world, to: own1, bind: bind, goes: "app", rule: redirect.RuleInExcludePort},
			flow{by: app, to: "10.99.1.1:80 [fd99::5]:80", goes: "out"},
			flow{by: proxy, to: "10.99.1.1:80 [fd99::5]:80", goes: "world"})
		// For lack of IP_TRANSPARENT nothing may get around the proxy.
		opaque := h.on(t, "tproxy, not transparent")
		if h.can.ConnectHooks {
			opaque.try(flow{by: world, to: own, goes: "in"})
			h.note(noteOpaque)
			return
		}
		for _, dst := range strings.Fields(own) {
			r := opaque.who(world).Connect(t, testbed.ConnectSpec{Dst: opaque.expand(dst), Timeout: silence})
			if r.Errno != testbed.ErrnoTimeout || r.Step != testbed.StepConnect {
				t.Errorf("%s, a listener that is not transparent: %q at %s, by %q", dst, r.Errno, r.Step, r.Listener())
			}
		}
	}},
	{section: 5, what: "TPROXY: the proxy from the client's address", quote: "the proxy's own connection to the app from the client's address", setup: "tproxy", play: playSpoofing},

	{section: 6, what: "proxy, agent and API server down", quote: "whatever is down (proxy, agent, API server", setup: "alone", play: func(t *testing.T, h *house) {
		// Of agent and API server there is none in all of these rows.
		s := h.on(t, "alone")
		down := []flow{
			{by: app, to: "10.99.1.1:80 [fd99::5]:80", goes: "ECONNREFUSED"},
			{by: proxy, to: own, goes: "ECONNREFUSED"},
			{by: world, to: own, goes: "ECONNREFUSED"},
			{by: app, to: lo, goes: "app"},
			{by: world, to: own1, goes: "app"},
		}
		s.try(down...)
		up := s.listen(t, testbed.ListenSpec{Name: "out", Addr: ap("[::]:15001")}, listenIn("[::]:15006"))
		for i, goes := range []string{"out", "in", "in"} {
			f := down[i]
			f.goes = goes
			s.try(f)
		}
		closeAll(t, up)
		s.try(down...)
	}},
	{section: 6, what: "a full map", quote: "a full map", setup: "bare", play: playFullMap},
	{section: 6, what: "a helper that fails", quote: "a helper that fails", setup: "alone", play: func(t *testing.T, h *house) {
		// Bound to a port and no address, and no listener that would tell
		// eBPF which: its bind fails.
		h.in(t, "alone", flow{by: app, to: "10.99.1.1:80 [fd99::5]:80", bind: "0.0.0.0:5021 [::]:5021", goes: "ECONNREFUSED"},
			flow{by: proxy, to: "10.99.1.1:80 [fd99::5]:80", bind: "0.0.0.0:5022 [::]:5022", goes: "world"})
		if s := h.on(t, "alone"); h.bpfDir != "" && h.failed(t, s.Pod)[bpf.ShuntPlacePLACE_CONNECT_BIND] == 0 {
			t.Error("no helper has failed")
		}
	}},
	{section: 6, what: "never a wrong original destination", quote: "it is never given a wrong one", setup: "bare", play: playNeverWrong},
}

// with gives the flow with who is to serve it, and the rule that decides.
func (f flow) with(goes string, rule redirect.Rule) flow {
	f.goes, f.rule = goes, rule
	return f
}

const waysQuote = "Non-blocking connect, connect by"

// way is the row of a way to connect.
func way(what string, shape func(*testbed.ConnectSpec)) lawRow {
	return lawRow{section: 4, what: what, quote: waysQuote, setup: "lists", play: func(t *testing.T, h *house) {
		s := h.on(t, "lists")
		probe := testbed.ConnectSpec{Dst: ap("127.0.0.1:8080")}
		shape(&probe)
		if r := s.who(app).Connect(t, probe); r.Errno != "" {
			t.Skipf("not here: %s at %s", r.Errno, r.Step)
		}
		for range 2 { // the first may only be told that fast open is possible
			s.try(
				flow{by: app, to: included, goes: "out", shape: shape},
				flow{by: app, to: excluded, goes: "world", shape: shape},
				flow{by: app, to: own, goes: "app", shape: shape},
				flow{by: proxy, to: included, goes: "world", shape: shape},
				flow{by: proxy, to: own, goes: "in", shape: shape})
		}
	}}
}

// refuses: a client is refused where REDIRECT finds no listener, and never gets
// the app.
func (s *stage) refuses(t *testing.T) {
	t.Helper()
	refused := func(to string) {
		t.Helper()
		for _, a := range strings.Fields(to) {
			r := s.who(world).Connect(t, testbed.ConnectSpec{Dst: s.expand(a)})
			if r.Errno != "ECONNREFUSED" || !r.AtOnce() {
				t.Errorf("%s: %q by %q after %v", a, r.Errno, r.Listener(), r.Elapsed)
			}
		}
	}
	direct := flow{by: world, to: own1, goes: "app"}
	refused(own)
	s.try(direct)
	for _, x := range []struct {
		listeners []string
		served    string
	}{
		{[]string{"127.0.0.1:15006", "[::1]:15006"}, ""},
		{[]string{"[::]:15006"}, own},
		{[]string{"A4:15006", "[A6]:15006"}, own},
		{[]string{"0.0.0.0:15006"}, strings.Fields(own)[0]},
	} {
		var specs []testbed.ListenSpec
		for _, a := range x.listeners {
			specs = append(specs, testbed.ListenSpec{Name: "in", Addr: s.expand(a)})
		}
		open := s.listen(t, specs...)
		if x.served != "" {
			s.try(flow{by: world, to: x.served, goes: "in"})
		}
		for _, a := range strings.Fields(own) {
			if !strings.Contains(x.served, a) {
				refused(a)
			}
		}
		s.try(direct)
		closeAll(t, open)
	}
	refused(own)
}

// lead has what the world sends to addresses that are not the pod's come by net1.
func (s *stage) lead(t *testing.T, addrs ...string) {
	t.Helper()
	w, net1 := s.house.node.world, s.Interfaces[1]
	mac, err := net.ParseMAC(net1.MAC)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range addrs {
		a := netip.MustParseAddr(text)
		w.Route(t, netip.PrefixFrom(a, a.BitLen()), s.Pod, net1.Name)
		routes, err := w.Netlink().RouteGet(a.AsSlice())
		if err != nil {
			t.Fatalf("route to %v: %v", a, err)
		}
		if err := w.Netlink().NeighSet(&netlink.Neigh{LinkIndex: routes[0].LinkIndex, State: unix.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac}); err != nil {
			t.Fatalf("add neighbour %v: %v", a, err)
		}
	}
}

// playOwners: root creates sockets with the file system ids of others, as a
// setuid program's are.
func playOwners(t *testing.T, h *house) {
	s := h.on(t, "lists")
	if s.actors["root"] == nil {
		s.actors["root"] = s.Actor(h.parent, "root", 0, 0)
	}
	for _, x := range []struct {
		uid, gid int
		goes     string
	}{
		{0, 0, "out"}, {testbed.ProxyUID, 0, "world"}, {0, testbed.ProxyGID, "world"}, {testbed.AppUID, testbed.AppGID, "out"},
	} {
		for _, dst := range strings.Fields(included) {
			spec := testbed.ConnectSpec{Dst: ap(dst), Abort: true, SocketSpec: testbed.SocketSpec{FSUID: &x.uid, FSGID: &x.gid}}
			before := s.counted()
			s.expect(flow{by: "root", goes: x.goes}, spec, netip.Addr{}, before, s.who("root").Connect(t, spec))
		}
	}
}

// silence is how long nothing must come for it to count as nothing.
const silence = 250 * time.Millisecond

func playTimeWait(t *testing.T, h *house) {
	for _, name := range []string{"time-wait", "time-wait, kept"} {
		s := h.on(t, name)
		for _, dst := range strings.Fields(own) {
			src := ap("10.99.0.7:7777") // 1E61
			if s.expand(dst).Addr().Is6() {
				src = ap("[fd99::7]:7777")
			}
			spec := testbed.ConnectSpec{
				Dst: s.expand(dst), AwaitClose: true, SocketSpec: testbed.SocketSpec{Bind: src, ReuseAddr: true},
			}
			for i := range 3 {
				if i > 0 && h.hook == redirect.HookTC && name != "time-wait" {
					s.waits(t, spec)
					break
				}
				r := s.who(world).Connect(t, spec)
				if r.Errno != "" || r.Listener() != "in" || !r.AtOnce() {
					t.Errorf("%s, connection %d from %v: %s at %s, by %q after %v", name, i, src, r.Errno, r.Step, r.Listener(), r.Elapsed)
				}
				// Else the test shows nothing.
				testbed.Eventually(t, "TIME_WAIT in the pod", func() bool {
					b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp6", s.proxy.PID))
					return err == nil && strings.Contains(string(b), ":1E61 06 ")
				})
			}
		}
	}
}

// waits: a connection hits TIME_WAIT that TC may not end, and nobody answers.
func (s *stage) waits(t *testing.T, spec testbed.ConnectSpec) {
	t.Helper()
	drops := func() int { return s.house.failed(t, s.Pod)[bpf.ShuntPlacePLACE_TC_REOPEN] }
	before := drops()
	spec.Timeout = silence
	if r := s.who(world).Connect(t, spec); r.Errno != testbed.ErrnoTimeout || r.Step != testbed.StepConnect || drops() == before {
		t.Errorf("into TIME_WAIT that is kept: %q at %s, by %q, %d dropped", r.Errno, r.Step, r.Listener(), drops()-before)
	}
	s.house.note(noteTimeWait)
}

func playReusePort(t *testing.T, h *house) {
	s := h.on(t, "alone")
	const connections = 40
	var workers []*testbed.Actor
	worker := func(name string, each int) *testbed.Actor {
		a := s.Actor(t, name, testbed.ProxyUID, testbed.ProxyGID)
		for range each {
			spec := listenIn("[::]:15006")
			spec.ReusePort = true
			a.Listen(t, spec)
		}
		return a
	}
	served := func() map[string]int {
		by := map[string]int{}
		for _, dst := range strings.Fields(own) {
			specs := slices.Repeat([]testbed.ConnectSpec{{Dst: s.expand(dst), Abort: true}}, connections/2)
			for _, r := range s.who(world).ConnectBatch(t, specs) {
				if r.Listener() != "in" || r.Errno != "" {
					t.Fatalf("%s: %q by %q", dst, r.Errno, r.Listener())
				}
				by[r.Served.Actor]++
			}
		}
		return by
	}
	workers = append(workers, worker("one", 2), worker("two", 2))
	// 20 on average: less than 3 has a chance of one in a thousand millions.
	if got := served(); got["one"] < 3 || got["two"] < 3 {
		t.Errorf("they have served %v", got)
	}
	workers[0].Stop(t)
	if got := served(); got["two"] != connections {
		t.Errorf("with one gone: %v", got)
	}
	workers[1].Kill(t)
	s.try(flow{by: world, to: own, goes: "ECONNREFUSED"})

	// More than the datapath has places for.
	first, middle, last := worker("first", 16), worker("middle", 8), worker("last", 16)
	first.Stop(t)
	last.Stop(t)
	f := flow{by: world, to: own, goes: "in"}
	if r := s.who(world).Connect(t, testbed.ConnectSpec{Dst: at(s.Addr4(), 8080)}); h.hook == redirect.HookSkLookup && r.Errno == "ECONNREFUSED" {
		f.goes = r.Errno
		h.note(noteMany)
	}
	s.try(f)
	middle.Stop(t)
}

func playMPTCPListener(t *testing.T, h *house) {
	s := h.on(t, "alone")
	spec := listenIn("[::]:15006")
	spec.MPTCP = true
	l, errno := s.proxy.TryListen(t, spec)
	if errno != "" {
		t.Skipf("no MPTCP in this kernel: %s", errno)
	}
	f := flow{by: world, to: own, goes: "in"}
	if h.hook == redirect.HookSkLookup {
		h.note(noteMPTCP)
		if h.failed(t, s.Pod)[bpf.ShuntPlacePLACE_LISTENER_REGISTER] > 0 {
			f.goes = "ECONNREFUSED"
		}
	}
	s.try(f, flow{by: world, to: own1, goes: "app"})
	l.CloseAll(t)
}

// playSpoofing: with the client's own address and port, while its connection lives.
func playSpoofing(t *testing.T, h *house) {
	s := h.on(t, "tproxy")
	for i, dst := range strings.Fields(own) {
		dst, lo := s.expand(dst), ap(strings.Fields(lo)[i])
		source := ap("203.0.113.78:40404")
		if dst.Addr().Is6() {
			source = ap("[2001:db8::78]:40404")
		}
		connect := func(by string, to netip.AddrPort, mark int) testbed.ConnectResult {
			return s.who(by).Connect(t, testbed.ConnectSpec{Dst: to, Keep: true, SocketSpec: testbed.SocketSpec{Bind: source, ReuseAddr: true, Transparent: true, Mark: mark}})
		}
		leave := func(by string, r testbed.ConnectResult) {
			s.who(by).Linger0(t, r.Sock)
			s.who(by).Close(t, r.Sock)
		}
		client := connect(world, dst, 0)
		for _, x := range []struct {
			to   netip.AddrPort
			mark int
			goes string
		}{{lo, 0, "app"}, {lo, iptables.Mark, "app"}, {at(dst.Addr(), 8081), iptables.Mark, "app"}, {at(dst.Addr(), 8081), 0, "in"}} {
			r := connect(proxy, x.to, x.mark)
			if r.Listener() != x.goes || plain(r.Served.Peer) != source.String() {
				t.Errorf("the proxy to %v, mark %d: %q by %q", x.to, x.mark, r.Errno, r.Listener())
			} else if log := say(t, s.who(proxy), r.Sock); log != ", answered, answered, answered" {
				t.Errorf("the proxy to %v, mark %d: %s", x.to, x.mark, log)
			}
			leave(proxy, r)
		}
		if log := say(t, s.who(world), client.Sock); client.Listener() != "in" || log != ", answered, answered, answered" {
			t.Errorf("the client: %q%s", client.Listener(), log)
		}
		leave(world, client)
	}
}

// playFullMap: a pod that has as many handshakes under way as it may.
func playFullMap(t *testing.T, h *house) {
	s := h.on(t, "bare")
	f := flow{by: app, to: "10.99.1.1:80 [fd99::5]:80", goes: "out"}
	s.try(f)
	if h.bpfDir == "" {
		h.note(noteNoMap)
		return
	}
	states := h.pinned(t, bpf.ShuntMapStates)
	defer states.Close()
	under := func(way int64) {
		t.Helper()
		testbed.Eventually(t, "every handshake to end", func() bool { n := h.state(t, s.Pod).Inflight; return n == 0 || n == full })
		state := h.state(t, s.Pod)
		state.Inflight = way
		if err := states.Put(s.NetnsCookie(t), &state); err != nil {
			t.Fatal(err)
		}
	}
	under(full)
	defer under(0)
	s.try(flow{by: app, to: f.to, goes: "EPERM"}, flow{by: proxy, to: f.to, goes: "world"}, flow{by: app, to: lo, goes: "app"})
	under(0)
	s.try(f)
}

// full is how many handshakes a pod may have under way.
const full = 1 << 16

func playNeverWrong(t *testing.T, h *house) {
	s := h.on(t, "bare")
	// From one source, to one after the other.
	for i := range 8 {
		s.try(flow{by: app, to: fmt.Sprintf("10.99.3.%d:%d [fd99::3:%d]:%d", i, 80+i, i, 80+i), bind: "A4:5031 [A6]:5031", goes: "out"})
	}
	// Who is in the pod's network but not of the pod, nobody has noted.
	stranger := s.Actor(t, "stranger", 0, 0, testbed.InHostCgroup())
	defer stranger.Stop(t)
	for _, dst := range []string{"127.0.0.1:15001", "[::1]:15001", "A4:15006", "[A6]:15006"} {
		to := s.expand(dst)
		r := stranger.Connect(t, testbed.ConnectSpec{Dst: to})
		if r.Served == nil {
			t.Errorf("%s: %q", dst, r.Errno)
			continue
		}
		for _, o := range []testbed.OrigDst{r.Served.OrigDst4, r.Served.OrigDst6} {
			if o.OK() && plain(o.Addr) != to.String() {
				t.Errorf("%s: the proxy is told %v", dst, o.Addr)
			}
		}
	}
}

// resolvers has the toys of the world and of the pod answer.
func (s *stage) resolvers() ring {
	h := s.house
	if h.outside == nil {
		h.outside = worldRing(h.parent, h.node.world)
	}
	if s.ring == nil {
		s.ring = slices.Concat(h.outside, podRing(h.parent, s.who, s.policy.Proxy.DNSPort))
	}
	return s.ring
}

// moreScenarios are what dnsScenarios has not, each being about another setup or
// about a rule.
var moreScenarios = map[string]func(p *dnsPod) (got, want []string){
	"UDP, not captured": func(p *dnsPod) (got, want []string) {
		for _, port := range []uint16{dnsPort, dnsPort + 1} {
			to := at(p.one.Addr(), port)
			c := p.client(app, p.family())
			c.ask("q", to)
			c.hear(1)
			got, want = append(got, c.close()...), append(want, p.heard(to, "world", "q")...)
		}
		return got, want
	},
	"from S6": func(p *dnsPod) (got, want []string) {
		s6 := netip.MustParseAddr("127.0.0.6")
		if p.family() == 6 {
			s6 = netip.MustParseAddr("::6")
		}
		for _, x := range []struct {
			bind    netip.AddrPort
			answers string
		}{{at(s6, 0), "app"}, {netip.AddrPort{}, "dns"}} {
			c := newClient(p.t, p.ring, p.who(app), testbed.SocketSpec{Family: p.family(), Bind: x.bind})
			to := at(p.own, dnsPort)
			c.ask("q", to)
			c.hear(1)
			got = append(got, c.close()...)
			from := p.own
			if x.bind.IsValid() {
				from = s6
			}
			want = append(want, fmt.Sprintf("%v: %s to %v: q", to, x.answers, from))
		}
		return got, want
	},
	// That rule is TCP's alone.
	"an excluded CIDR": func(p *dnsPod) (got, want []string) {
		to := ap("10.97.0.53:53")
		if p.family() == 6 {
			to = ap("[fd97::53]:53")
		}
		c := p.client(app, p.family())
		c.ask("q", to)
		c.hear(1)
		return c.close(), p.heard(to, "dns", "q")
	},
	"eth0 excluded": func(p *dnsPod) (got, want []string) { return p.byWays("world", "dns") },
	"lo excluded":   func(p *dnsPod) (got, want []string) { return p.byWays("dns", "app") },
	"net1 excluded": func(p *dnsPod) (got, want []string) {
		to, from := ap("10.77.0.53:53"), p.Interfaces[1].Addrs[0].Addr()
		if p.family() == 6 {
			to, from = ap("[fd77::53]:53"), p.Interfaces[1].Addrs[1].Addr()
		}
		for _, x := range []struct {
			to      netip.AddrPort
			answers string
			from    netip.Addr
		}{{to, "world", from}, {p.one, "dns", p.own}} {
			c := p.client(app, p.family())
			c.ask("q", x.to)
			c.hear(1)
			got, want = append(got, c.close()...), append(want, fmt.Sprintf("%v: %s to %v: q", x.to, x.answers, x.from))
		}
		return got, want
	},
}

// byWays asks a resolver outside, and the pod itself, connected and not: by eth0
// and by lo.
func (p *dnsPod) byWays(outside, inside string) (got, want []string) {
	for _, x := range []struct {
		to      netip.AddrPort
		answers string
	}{{p.one, outside}, {at(p.own, dnsPort), inside}} {
		c := p.client(app, p.family())
		c.ask("q", x.to)
		c.hear(1)
		got = append(got, c.close()...)
		c = p.client(app, p.family())
		if c.connect(x.to) {
			c.ask("q", netip.AddrPort{})
			c.hear(1)
		}
		answer := fmt.Sprintf("%v: %s to %v: q", x.to, x.answers, p.own)
		got, want = append(got, c.close()...), append(want, answer, fmt.Sprintf("connected to %v", x.to), answer)
	}
	return got, want
}

// resolve plays scenarios of resolvers in the pod of a setup, in both families.
func (h *house) resolve(t *testing.T, setup string, names ...string) {
	t.Helper()
	s := h.on(t, setup)
	for _, name := range names {
		play := moreScenarios[name]
		for _, sc := range dnsScenarios {
			if sc.name == name {
				play = sc.play
			}
		}
		if play == nil {
			t.Fatalf("no scenario %q", name)
		}
		for _, six := range []bool{false, true} {
			p := &dnsPod{pod: s.pod, t: t, ring: s.resolvers(), own: s.Addr4(), cluster: cluster{ap("10.99.0.53:53"), ap("10.99.0.54:53"), ap("10.98.0.53:53")}}
			if six {
				p.own, p.cluster = s.Addr6(), cluster{ap("[fd99::53]:53"), ap("[fd99::54]:53"), ap("[fd98::53]:53")}
			}
			got, want := play(p)
			if slices.Contains(atOnce, name) && !slices.Equal(got, want) {
				got, want = byLaw(got, want)
				h.note(noteLast)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s, IPv%d (-want +got):\n%s", name, p.family(), diff)
			}
		}
	}
}

// atOnce are the scenarios in which one socket asks several captured resolvers
// before it hears any.
var atOnce = []string{"musl", "musl, by a socket for both families", "many at once", "captured, and not, by one socket"}

// byLaw gives answers as the law compares them where one socket has asked
// several resolvers: of those that the proxy has given, any source that is
// wanted of one of them will do.
func byLaw(got, want []string) (got2, want2 []string) {
	const proxys = ": dns to "
	var asked []string
	for _, line := range want {
		if source, _, ok := strings.Cut(line, proxys); ok {
			asked = append(asked, source)
		}
	}
	compared := func(lines []string) (list []string) {
		for _, line := range lines {
			if source, rest, ok := strings.Cut(line, proxys); ok && slices.Contains(asked, source) {
				line = "one that was asked" + proxys + rest
			}
			list = append(list, line)
		}
		slices.Sort(list)
		return list
	}
	return compared(got), compared(want)
}

// ping sends an echo request from a socket of an actor's, and tells who answers.
func ping(t testing.TB, by *testbed.Actor, dst netip.Addr) string {
	t.Helper()
	family, request := familyOf(dst), byte(8)
	if family == 6 {
		request = 128
	}
	fd := by.Take(t, by.Socket(t, testbed.SocketSpec{Family: family, Ping: true}))
	defer unix.Close(fd)
	// The kernel fills in checksum and identifier.
	if err := unix.Sendto(fd, []byte{request, 0, 0, 0, 0, 0, 0, 1, 's'}, 0, sockaddrOf(at(dst, 0), family)); err != nil {
		return "send: " + errno(err)
	}
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, from, err := unix.Recvfrom(fd, buf, 0)
	if err != nil || n != 9 || buf[8] != 's' {
		return fmt.Sprintf("%q, %s", buf[:max(n, 0)], errno(err))
	}
	return fmt.Sprintf("echoed by %v", addrPortOf(from).Addr())
}
