// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/redirect"
)

// A fakeNode is a node's backends and its sandboxes; it writes down what is asked
// of it.
type fakeNode struct {
	diary   []string
	check   error
	foreign []string
	apply   error
	boxes   []*sandbox // one for each find; nil: none
	lost    error      // of find
	target  redirect.Target
	policy  *redirect.Policy
	has     []redirect.Attachment
	there   map[string]bool
}

func (n *fakeNode) Apply(_ context.Context, t redirect.Target, p *redirect.Policy, c redirect.Choice) (redirect.Choice, error) {
	n.diary, n.target, n.policy = append(n.diary, "apply"), t, p
	return c, n.apply
}

func (n *fakeNode) Check(context.Context, redirect.Target) error {
	n.diary = append(n.diary, "check")
	return n.check
}

func (n *fakeNode) Remove(_ context.Context, a redirect.Attachment) error {
	n.diary = append(n.diary, "remove "+a.ContainerID)
	return nil
}

func (n *fakeNode) Attachments(_ context.Context, name string) ([]redirect.Attachment, error) {
	if name != network {
		return nil, fmt.Errorf("network %q", name)
	}
	return n.has, nil
}

func (n *fakeNode) Foreign(context.Context, string) ([]string, error) {
	n.diary = append(n.diary, "foreign")
	return n.foreign, nil
}

func (n *fakeNode) find(context.Context, *corev1.Pod) (*sandbox, error) {
	if len(n.boxes) == 0 {
		return nil, n.lost
	}
	box := n.boxes[0]
	if n.boxes = n.boxes[1:]; box == nil {
		return nil, errNoSandbox
	}
	return box, nil
}

func (n *fakeNode) all(context.Context) (map[string]bool, error) { return n.there, nil }

func TestMend(t *testing.T) {
	netns := filepath.Join(t.TempDir(), "netns")
	if err := os.WriteFile(netns, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a, b := &sandbox{ID: "a", Netns: netns}, &sandbox{ID: "b", Netns: netns}
	none := fmt.Errorf("x: %w", redirect.ErrNotProgrammed)
	unseen := errors.New("the runtime does not answer")
	for _, tc := range []struct {
		name    string
		node    fakeNode
		pod     func(*corev1.Pod)
		others  bool
		did     string
		already bool
		fails   string
	}{
		{name: "nothing is programmed", node: fakeNode{check: none, boxes: []*sandbox{a, a}}, did: "check foreign apply"},
		{name: "it differs", node: fakeNode{check: errors.New("differs"), boxes: []*sandbox{a, a}}, did: "check apply"},
		{name: "it is right", node: fakeNode{boxes: []*sandbox{a}}, did: "check", already: true},
		{name: "others redirect it", node: fakeNode{check: none, foreign: []string{"ISTIO_REDIRECT"}, boxes: []*sandbox{a}}, did: "check foreign", fails: "ISTIO_REDIRECT"},
		{name: "whoever redirects it, its validation fails", node: fakeNode{check: none, foreign: []string{"ISTIO_REDIRECT"}, boxes: []*sandbox{a, a}}, others: true, did: "check apply"},
		{name: "it can't be told", node: fakeNode{check: os.ErrPermission, boxes: []*sandbox{a}}, did: "check", fails: "permission"},
		{name: "its namespace has gone", node: fakeNode{check: none, boxes: []*sandbox{{ID: "a", Netns: netns + "x"}}}, did: "check", fails: "nothing is programmed"},
		{name: "no sandbox", node: fakeNode{boxes: []*sandbox{nil}}, fails: errNoSandbox.Error()},
		{name: "it can't be programmed", node: fakeNode{check: none, apply: errors.New("the map is full"), boxes: []*sandbox{a}}, others: true, did: "check apply", fails: "the map is full"},
		{name: "the sandbox ends meanwhile", node: fakeNode{check: none, boxes: []*sandbox{a, nil}}, others: true, did: "check apply remove a", fails: "undone"},
		{name: "another sandbox comes meanwhile", node: fakeNode{check: none, boxes: []*sandbox{a, b}}, others: true, did: "check apply remove a", fails: "undone"},
		{name: "the runtime ends meanwhile", node: fakeNode{check: none, boxes: []*sandbox{a}, lost: unseen}, others: true, did: "check apply"},
		{name: "it is to be left alone", pod: func(p *corev1.Pod) { p.Namespace = "kube-system" }, fails: "P3"},
		{name: "the agent's own", pod: func(p *corev1.Pod) { p.Namespace, p.Name = "mesh", "shunt-node-x7k2p" }, fails: "P4"},
		{name: "a bad annotation", pod: func(p *corev1.Pod) {
			p.Annotations["traffic.sidecar.istio.io/excludeOutboundPorts"] = "x"
		}, fails: "P15"},
		{name: "an impossible wish", node: fakeNode{check: none, boxes: []*sandbox{a}}, others: true, pod: func(p *corev1.Pod) {
			p.Annotations["shunt.dev/datapath"] = "ebpf"
			p.Annotations["istio.io/reroute-virtual-interfaces"] = "eth1"
		}, did: "check", fails: "choose a datapath"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conf := netconf.Default()
			conf.RunDir = t.TempDir()
			write(t, filepath.Join(conf.RunDir, "agent"), "mesh/shunt-node\n")
			m := &mender{conf: conf, log: slog.New(slog.DiscardHandler), find: &tc.node, node: &tc.node}
			pod := broken("x", func(p *corev1.Pod) { p.Status.PodIPs = []corev1.PodIP{{IP: "10.244.0.10"}, {IP: "fd10::10"}} })
			if tc.pod != nil {
				tc.pod(pod)
			}
			_, already, err := m.mend(t.Context(), pod, tc.others)
			if already != tc.already || (err != nil) != (tc.fails != "") || err != nil && !strings.Contains(err.Error(), tc.fails) {
				t.Errorf("already %v, error %v", already, err)
			}
			if diff := cmp.Diff(tc.did, strings.Join(tc.node.diary, " ")); diff != "" {
				t.Error(diff)
			}
			if to := tc.node.target; strings.HasPrefix(tc.name, "nothing is programmed") {
				if to.ContainerID != "a" || to.IfName != "eth0" || to.Network != network || to.Netns != netns || !to.Running ||
					to.Pod != (redirect.PodRef{Namespace: "shop", Name: "x", UID: "uid-x"}) || len(to.Addrs) != 2 || tc.node.policy == nil {
					t.Errorf("target %+v", to)
				}
			}
		})
	}
}

// TestTidy: what was made here for sandboxes that are gone goes, the rest stays.
func TestTidy(t *testing.T) {
	n := &fakeNode{
		has:   []redirect.Attachment{{ContainerID: "a", IfName: "eth0"}, {ContainerID: "b", IfName: "eth0"}},
		there: map[string]bool{"a": true, "c": true},
	}
	m := &mender{log: slog.New(slog.DiscardHandler), find: n, node: n}
	tidy := func(when string, want ...string) {
		t.Helper()
		if err := m.tidy(t.Context()); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(want, n.diary); diff != "" {
			t.Errorf("%s:\n%s", when, diff)
		}
	}
	there := n.there
	tidy("missed once")
	n.there = map[string]bool{"a": true, "b": true}
	tidy("there again")
	n.there = there
	tidy("missed once more")
	n.there = nil
	tidy("a runtime that knows nothing")
	n.there = there
	tidy("missed twice", "remove b")
}
