// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"shunt.dev/shunt/internal/fakekube"
	"shunt.dev/shunt/internal/podcache"
	"shunt.dev/shunt/internal/spool"
	"shunt.dev/shunt/internal/testbed"
)

// TestPrivilegedAgent: the plugin as a process, and the agent's own cache. With
// the agent it needs no kubeconfig; without it the API server; and the agent
// hears of each ADD, also of those while it was down.
func TestPrivilegedAgent(t *testing.T) {
	n := newNode(t, begin(t))
	kubeconfig := n.Kubeconfig
	api := fakekube.Start(t)
	config, err := clientcmd.RESTConfigFromKubeConfig(api.Kubeconfig(api.Token()))
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	cache := podcache.New(podcache.Options{Client: client, Node: "node-1", RunDir: n.RunDir})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- cache.Run(ctx) }()
	testbed.Eventually(t, "the agent is ready", cache.Synced)

	p := n.pod(t)
	if err := api.SetJSON(p.Injected()); err != nil {
		t.Fatal(err)
	}
	n.Kubeconfig = "/none/such"
	n.MustAdd(t, p)
	n.MustCheck(t, p)
	if asked := n.api.Requests(); len(asked) != 0 {
		t.Errorf("the plugin asked the API server itself: %v", asked)
	}
	n.MustDel(t, p)

	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if r := n.Add(t, p, testbed.Set("podFactsTimeout", factsLimit)); r.Code() != 11 {
		t.Errorf("with nobody to ask: %v", r)
	}
	n.Kubeconfig = kubeconfig
	n.MustAdd(t, p)
	if asked := n.api.Requests(); len(asked) != 1 {
		t.Errorf("without the agent the API server was asked: %v", asked)
	}
	n.MustDel(t, p)

	var got []spool.Setup
	if _, err := spool.Drain(n.RunDir, func(line []byte) {
		if s, ok := spool.ParseSetup(line); ok {
			s.Seconds = 0
			got = append(got, s)
		}
	}); err != nil {
		t.Error(err)
	}
	want := []spool.Setup{
		{Backend: "ebpf", Result: spool.ResultOK, Reason: "served"},
		{Result: spool.ResultFailed},
		{Backend: "ebpf", Result: spool.ResultOK, Reason: "served"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("told the agent (-want +got):\n%s", diff)
	}
}
