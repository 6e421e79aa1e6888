// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"net/netip"
	"slices"
	"testing"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
	"shunt.dev/shunt/redirect"
	backend "shunt.dev/shunt/redirect/ebpf"
	"shunt.dev/shunt/redirect/iptables"
)

// A path is a way to the proxy; the names are the samples'.
type path string

const (
	// plain is a pod that nothing redirects: its app dials the proxy's port
	// itself. The floor. Where there is outside, too, eBPF redirects nobody on
	// the node meanwhile.
	plain path = "plain"
	// outside is the same pod, while others are redirected by eBPF.
	outside  path = "outside"
	skLookup path = "ebpf-sk_lookup"
	tc       path = "ebpf-tc"
	nft      path = "iptables-nft"
	legacy   path = "iptables-legacy"
	// direct is the proxy's own way to its app, at loopback, in a pod that
	// eBPF redirects: it is looked at, and let alone.
	direct path = "direct"
)

const (
	appPort   = 8080
	proxyPort = testbed.OutboundPort
)

// A lane is one path, with those who work at its ends.
type lane struct {
	path   path
	pod    *testbed.Pod
	client *worker
	server *worker
	port   int                    // where the server listens
	dials  map[int]netip.AddrPort // what the client connects to, by family
	spread bool                   // and their neighbours
}

// A dataNode has pods behind every path at once. Those of eBPF are taken out of its
// hands and given back while all of them work, as often as it is wanted.
type dataNode struct {
	world    *testbed.World
	opts     loader.Options
	backend  *backend.Backend
	attached bool
	pods     []attachment // behind eBPF
	parts    []part       // with programs of the benchmark's own
	detach   []func()     // takes those away
}

type part struct {
	pod  *testbed.Pod
	path path
}

type attachment struct {
	target redirect.Target
	policy *redirect.Policy
}

func newDataNode(b *testing.B) *dataNode {
	b.Helper()
	testbed.Privileged(b)
	n := &dataNode{
		world:    testbed.NewWorld(b),
		opts:     loader.Options{BPFDir: testbed.BPFFS(b) + "/shunt", RunDir: tmpfs(b), Programs: programs.New()},
		attached: true,
	}
	n.backend = backend.New(n.opts)
	if err := n.backend.Ready(b.Context()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		for _, detach := range n.detach {
			detach()
		}
	})
	return n
}

// pod makes a pod behind a path.
func (n *dataNode) pod(b *testing.B, by path, mutators ...testbed.PodMutator) *testbed.Pod {
	b.Helper()
	p := testbed.NewPod(b, testbed.InWorld(n.world))
	if by == plain {
		return p
	}
	if slices.Contains(parts, by) {
		n.parts = append(n.parts, part{p, by})
		n.detach = append(n.detach, attachPart(b, p, by))
		return p
	}
	pod, err := redirect.ParsePod(p.Injected(mutators...))
	if err != nil {
		b.Fatal(err)
	}
	cfg := redirect.DefaultConfig()
	outcome, policy, err := cfg.Evaluate(pod)
	if err != nil || policy == nil {
		b.Fatalf("evaluate: %+v, %v", outcome, err)
	}
	target := redirect.Target{
		Attachment: redirect.Attachment{ContainerID: p.ContainerID, IfName: "eth0"},
		Netns:      p.NetnsPath(), Cgroup: p.CgroupPath(),
		Pod:   redirect.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID},
		Addrs: p.AllAddrs(),
		// Attached again, it has its listener already.
		Running: true,
	}
	switch by {
	case skLookup, tc:
		if by == tc {
			target.Hook = redirect.HookTC
		}
		err = n.backend.Apply(b.Context(), target, policy)
		n.pods = append(n.pods, attachment{target, policy})
	case nft, legacy:
		mode := iptables.NFT
		if by == legacy {
			mode = iptables.Legacy
		}
		err = iptables.New(iptables.Options{RunDir: b.TempDir(), Mode: mode}).Apply(b.Context(), target, policy)
	}
	if err != nil {
		b.Fatalf("%s: %v", by, err)
	}
	if by == nft || by == legacy {
		// Else ended connections by the hundred thousand stay for 10 s, which
		// no pod has, and make looking among them slow.
		p.Sysctl(b, "net.netfilter.nf_conntrack_tcp_timeout_close", "1")
	}
	return p
}

// attach has eBPF redirect its pods, or nobody on the node.
func (n *dataNode) attach(b *testing.B, on bool) {
	b.Helper()
	if n.attached == on {
		return
	}
	n.attached = on
	for _, detach := range n.detach {
		detach()
	}
	n.detach = nil
	if on {
		for _, p := range n.parts {
			n.detach = append(n.detach, attachPart(b, p.pod, p.path))
		}
	}
	for _, a := range n.pods {
		var err error
		if on {
			err = n.backend.Apply(b.Context(), a.target, a.policy)
		} else {
			err = n.backend.Remove(b.Context(), a.target.Attachment)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// outbound gives lanes for a pod's own connections. On redirected paths the app
// dials an address that nobody has.
func (n *dataNode) outbound(b *testing.B, mutators []testbed.PodMutator, paths ...path) (lanes []lane) {
	b.Helper()
	var ready lane
	for _, by := range paths {
		l := lane{path: by, port: proxyPort, dials: map[int]netip.AddrPort{4: farAway4, 6: farAway6}, spread: true}
		switch by {
		case outside:
			l = ready
			l.path = by
			lanes = append(lanes, l)
			continue
		case direct:
			l.port = appPort
			l.dials, l.spread = loopback(appPort), false
			l.pod = n.pod(b, skLookup, mutators...)
			l.client = loadIn(b, l.pod, "proxy", testbed.ProxyUID, testbed.ProxyGID)
			l.server = loadIn(b, l.pod, "app", testbed.AppUID, testbed.AppGID)
		case plain, hooks:
			l.dials, l.spread = loopback(proxyPort), false
			fallthrough
		default:
			l.pod = n.pod(b, by, mutators...)
			l.client = loadIn(b, l.pod, "app", testbed.AppUID, testbed.AppGID)
			l.server = loadIn(b, l.pod, "proxy", testbed.ProxyUID, testbed.ProxyGID)
		}
		l.server.do(b, order{Op: opListen, Port: l.port})
		if by == plain {
			ready = l
		}
		lanes = append(lanes, l)
	}
	return lanes
}

var (
	farAway4 = netip.MustParseAddrPort("198.51.100.7:80")
	farAway6 = netip.MustParseAddrPort("[2001:db8::7]:80")
)

func loopback(port uint16) map[int]netip.AddrPort {
	return map[int]netip.AddrPort{
		4: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port),
		6: netip.AddrPortFrom(netip.IPv6Loopback(), port),
	}
}

// inbound gives lanes for connections from another netns to the app's port,
// where on the plain path the proxy listens itself.
func (n *dataNode) inbound(b *testing.B, paths ...path) (lanes []lane) {
	b.Helper()
	client := loadOutside(b, n.world)
	for _, by := range paths {
		p := n.pod(b, by)
		l := lane{path: by, pod: p, client: client, port: testbed.InboundPort, dials: map[int]netip.AddrPort{
			4: netip.AddrPortFrom(p.Addr4(), appPort),
			6: netip.AddrPortFrom(p.Addr6(), appPort),
		}}
		if by == plain {
			l.port = appPort
		}
		l.server = loadIn(b, p, "proxy", testbed.ProxyUID, testbed.ProxyGID)
		l.server.do(b, order{Op: opListen, Port: l.port})
		lanes = append(lanes, l)
	}
	return lanes
}

// run has the server and the client of a lane do their parts.
func (l lane) run(b *testing.B, family int, server, client order) (atServer, atClient report) {
	b.Helper()
	server.Port = l.port
	client.Dst, client.Spread = l.dials[family], l.spread
	l.server.order(b, server)
	atClient = l.client.do(b, client)
	return l.server.report(b), atClient
}

// check fails unless the lane leads where it should, and redirects if it should.
// Nobody else would answer.
func (l lane) check(b *testing.B, family int) {
	b.Helper()
	got, _ := l.run(b, family, order{Op: opAsk, N: 1}, order{Op: opConverse, N: 1})
	want := l.dials[family]
	silent := slices.Contains(append([]path{plain, outside, direct}, parts...), l.path)
	if got.Dst != want && (got.Dst.IsValid() || !silent) {
		b.Fatalf("%s: the original destination is %v, not %v", l.path, got.Dst, want)
	}
}

// A measurement gives a sample's values; the first is what ratios are of.
type measurement func(b *testing.B, l lane, family int) []value

// rounds measures every lane once a round, each time beginning with another one,
// records all, and reports the ratios of the medians to plain's.
func (n *dataNode) rounds(b *testing.B, lanes []lane, family int, name func(path) string, measure measurement) {
	b.Helper()
	bare := slices.ContainsFunc(lanes, func(l lane) bool { return l.path == outside })
	for _, l := range lanes {
		l.check(b, family)
	}
	got := map[path][]float64{}
	for round := 0; b.Loop(); round++ {
		for i := range lanes {
			l := lanes[(round+i)%len(lanes)]
			n.attach(b, l.path != plain || !bare)
			values := measure(b, l, family)
			record(b, name(l.path), values...)
			got[l.path] = append(got[l.path], values[0].v)
		}
	}
	n.attach(b, true)
	b.ReportMetric(0, "ns/op")
	for p, all := range got {
		if p != plain {
			b.ReportMetric(middle(all)/middle(got[plain]), string(p)+"/plain")
		}
	}
}

func middle(all []float64) float64 {
	all = slices.Clone(all)
	slices.Sort(all)
	return all[len(all)/2]
}
