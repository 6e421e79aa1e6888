// SPDX-License-Identifier: Apache-2.0

//go:build linux

package flowgen

import (
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

// A Twin is a pod of a scene. All twins of a scene are alike, down to their
// addresses: each needs a world of its own, or its turn.
type Twin struct {
	*testbed.Pod
	Proxy *testbed.Proxy // once started

	scene  *Scene
	actors map[string]*testbed.Actor
}

// Actors of a twin, in [Trial].By. The proxy, and who has but one of its ids,
// the app, and root, who may create sockets for anyone.
const (
	ByApp     = "app"
	ByProxy   = "proxy"
	ByUIDOnly = "uid-only"
	ByGIDOnly = "gid-only"
	ByRoot    = "root"
	ByWorld   = "world"
)

// Twin makes a pod of the scene. The world must serve all.
func (s *Scene) Twin(t testing.TB, w *testbed.World) *Twin {
	t.Helper()
	return &Twin{Pod: testbed.NewPod(t, append([]testbed.Option{testbed.InWorld(w)}, s.pod...)...), scene: s}
}

// Start has the proxy and the app listen. The pod must have been programmed.
func (p *Twin) Start(t testing.TB) {
	t.Helper()
	s := p.scene
	x := s.Policy.Proxy
	out, in := x.OutboundPort, x.InboundPort
	switch s.Closed {
	case "out":
		out = 0
	case "in":
		in = 0
	}
	shape := []testbed.ProxyOption{testbed.ProxyPorts(out, in)}
	if s.split {
		shape = append(shape, testbed.SplitFamilies())
	}
	if s.Needs.TProxy {
		shape = append(shape, testbed.ProxyActor(testbed.WithCaps(unix.CAP_NET_ADMIN)),
			testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.Transparent = l.Name == "in" }))
	}
	uid, gid := int(x.UID), int(x.GID)
	p.Proxy = p.StartProxy(t, uid, gid, shape...)
	if s.Closed != "dns" {
		p.Proxy.Listen(t, testbed.ListenSpec{Name: "dns", Addr: at(netip.IPv6Unspecified(), x.DNSPort)})
	}
	p.Proxy.Listen(t, testbed.ListenSpec{Name: "tunnel", Addr: at(netip.IPv6Unspecified(), x.TunnelPort)})
	app := p.StartApp(t)
	for _, port := range s.ports {
		if !s.ofProxy(port) && !slices.Contains(s.silent, port) {
			app.Listen(t, testbed.ListenSpec{Name: "app", Addr: at(netip.IPv6Unspecified(), port), Forget: true})
		}
	}
	p.actors = map[string]*testbed.Actor{
		ByApp: app.Actor, ByProxy: p.Proxy.Actor, ByWorld: p.World.Actor,
		ByUIDOnly: p.Actor(t, ByUIDOnly, uid, bogusGID),
		ByGIDOnly: p.Actor(t, ByGIDOnly, bogusUID, gid),
		ByRoot:    p.Actor(t, ByRoot, 0, 0),
	}
}

// Who gives an actor by its name.
func (p *Twin) Who(by string) *testbed.Actor { return p.actors[by] }

// Run tries flows, one actor's after the other's, and gives the results in the
// order of the flows.
func (p *Twin) Run(t testing.TB, trials []Trial) []testbed.ConnectResult {
	t.Helper()
	results := make([]testbed.ConnectResult, len(trials))
	for _, by := range []string{ByApp, ByProxy, ByUIDOnly, ByGIDOnly, ByRoot, ByWorld} {
		var specs []testbed.ConnectSpec
		var which []int
		for i, x := range trials {
			if x.By == by {
				specs, which = append(specs, x.Spec), append(which, i)
			}
		}
		if len(specs) == 0 {
			continue
		}
		for j, r := range p.actors[by].ConnectBatch(t, specs) {
			results[which[j]] = r
		}
	}
	return results
}
