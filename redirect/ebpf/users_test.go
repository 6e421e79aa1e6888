// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

func ownUsers(k *testbed.KubePod) {
	off := false
	k.Spec.HostUsers = &off
}

// TestPrivilegedUserNamespace: the pod has its own user namespace, and the
// proxy's ids are those of that.
func TestPrivilegedUserNamespace(t *testing.T) {
	begin(t)
	n := newNode(t)
	const first = 100000
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w), testbed.UserNamespace(first)),
		append([]testbed.PodMutator{ownUsers}, append(dnsPolicy, tproxyPolicy...)...)...)
	uid, gid := int(p.policy.Proxy.UID), int(p.policy.Proxy.GID)
	p.StartProxy(t, first+uid, first+gid)
	d := &dnsPod{Pod: p.Pod}
	d.proxy = p.Actor(t, "dns", first+uid, first+gid)
	d.serve(t)
	for _, c := range []struct {
		uid, gid int
		direct   bool
	}{
		{first + testbed.AppUID, first + testbed.AppGID, false},
		{first + uid, first + gid, true},
		{first + uid, first + 5, true},
		{first + 5, first + gid, true},
		{uid, gid, false}, // the host's own, of that number
		{0, 0, false},
	} {
		a := p.Actor(t, fmt.Sprintf("user-%d-%d", c.uid, c.gid), c.uid, c.gid)
		for _, dst := range []string{"10.99.1.1:80", "[fd99::5]:443"} {
			from, listener := p.Addr4(), "out"
			if ap(dst).Addr().Is6() {
				from = p.Addr6()
			}
			if c.direct {
				listener = "world"
			}
			expect(t, a.Name, a.Dial(t, dst), want{listener: listener, dst: ap(dst), from: from})
		}
		if !c.direct {
			x := d.args("IPv4")
			if got := x.socket(t, a).ask("q", x.dst[0]); got.From != x.dst[0].String() {
				t.Errorf("%s: DNS: %+v", a.Name, got)
			}
		}
		a.Stop(t)
	}
	for _, a := range p.AllAddrs() {
		from := testbed.WorldAddr4
		if a.Is6() {
			from = testbed.WorldAddr6
		}
		expect(t, "inbound", w.Connect(t, testbed.ConnectSpec{Dst: at(a, 8080)}), want{listener: "in", dst: at(a, 8080), from: from})
	}
}

// TestPrivilegedUserNamespaceUnknown: ids that can't be found are an error, and
// nothing is programmed.
func TestPrivilegedUserNamespaceUnknown(t *testing.T) {
	begin(t)
	n := newNode(t)
	for _, c := range []struct {
		name    string
		opts    []testbed.Option
		policy  []testbed.PodMutator
		mention string
	}{
		{"no mapping", []testbed.Option{testbed.UserNamespace(100000)}, []testbed.PodMutator{ownUsers, testbed.ProxyIDs(70000, 1337)}, "70000"},
		{"no mapping of the group", []testbed.Option{testbed.UserNamespace(100000)}, []testbed.PodMutator{ownUsers, testbed.ProxyIDs(1337, 70000)}, "70000"},
		{"no user namespace", nil, []testbed.PodMutator{ownUsers}, "hostUsers"},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := testbed.NewPod(t, c.opts...)
			facts, err := redirect.ParsePod(k.Injected(c.policy...))
			if err != nil {
				t.Fatal(err)
			}
			cfg := redirect.DefaultConfig()
			_, policy, err := cfg.Evaluate(facts)
			if err != nil {
				t.Fatal(err)
			}
			err = n.Apply(t.Context(), redirect.Target{
				Attachment: redirect.Attachment{ContainerID: k.ContainerID, IfName: "eth0"},
				Netns:      k.NetnsPath(), Cgroup: k.CgroupPath(), Addrs: []netip.Addr{k.Addr4()},
			}, policy)
			if !errors.Is(err, loader.ErrUserNamespace) || !strings.Contains(err.Error(), c.mention) {
				t.Errorf("apply: %v", err)
			}
		})
	}
}
