// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"shunt.dev/shunt/e2e/wire"
)

// The chart's defaults.
var defaults = map[string]any{}

// A pod is redirected from its first moment on, its neighbour outside of the
// mesh is not touched, and nothing is left of either.
func TestPods(t *testing.T) {
	install(t, defaults)
	m := start(t, meshed("meshed"))
	o := start(t, plain("outside"))

	wantRedirected(t, m)
	if pins, _ := filepath.Glob("/sys/fs/bpf/shunt/cgroups/*"); len(pins) != 1 {
		t.Errorf("redirected pods' cgroups: got %v: expected one, eBPF's", pins)
	}
	wantOut(t, m, hostPort(o.Status.PodIP, wire.AppPort))
	if d := dialFrom(t, o, sinkAddr); d.Answer.Who != "sink" {
		t.Errorf("outside -> sink: got %+v", d)
	}
	if d := dialFrom(t, o, hostPort(m.Status.PodIP, wire.AppPort)); d.Answer.Who != "app" || !strings.HasPrefix(d.Answer.Peer, "127.0.0.6:") {
		t.Errorf("outside -> meshed: got %+v: expected the app's answer to its proxy", d)
	}
	if sink.by(o.Status.PodIP) == 0 {
		t.Error("the sink has not seen the pod outside of the mesh: it would not see a redirected one either")
	}
	deletePod(t, m.Name)
	deletePod(t, o.Name)
	wantNoTraces(t)
}

// After the DaemonSet has gone, the node's chain is what it was before, byte for
// byte; pods that run stay redirected, and can be deleted.
func TestUninstall(t *testing.T) {
	uninstall(t)
	before, err := os.ReadFile(chainFile)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(before, []byte("shunt")) {
		t.Fatalf("the chain before: %s", before)
	}
	install(t, defaults)
	chain, err := os.ReadFile(chainFile)
	if err != nil || !bytes.Contains(chain, []byte("shunt-cni")) {
		t.Fatalf("the chain with Shunt: %s, %v", chain, err)
	}
	m := start(t, meshed("stays"))

	uninstall(t)
	wantFile(t, chainFile, before)
	wantRedirected(t, m)
	o := start(t, meshed("later")) // no plugin: not redirected
	if d := dialFrom(t, o, sinkAddr); d.Answer.Who != "sink" {
		t.Errorf("a pod after the uninstallation: got %+v", d)
	}
	deletePod(t, m.Name)
	deletePod(t, o.Name)
	// The runtime has no chain with the plugin any more, and has not called it for
	// the pod's end. The next agent clears up.
	t.Logf("left after the last pod: %v", traces())
	install(t, defaults)
	wantNoTraces(t)
}
