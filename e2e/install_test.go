// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

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

// The runtime calls the plugin three times for the end of a pod: at once, and
// when the kubelet collects the sandbox twice without a netns. All of them are
// good, and nothing is left after any.
func TestDelete(t *testing.T) {
	install(t, defaults)
	var sandboxes []string
	for _, datapath := range []string{"ebpf", "iptables"} {
		p := start(t, meshed("ends-"+datapath, annotated(keyDatapath, datapath)))
		sandboxes = append(sandboxes, sandbox(t, p))
		deletePod(t, p.Name)
	}
	wantNoTraces(t)
	for _, id := range sandboxes {
		eventually(t, patience, "the runtime has taken the network of "+id[:12]+" down three times", func() error {
			log := runtimeLog(t)
			if n := strings.Count(log, `TearDown network for sandbox \"`+id+`\" successfully`); n < 3 {
				return fmt.Errorf("%d times", n)
			}
			return nil
		})
	}
	for line := range strings.Lines(runtimeLog(t)) {
		if strings.Contains(line, "failed to destroy network") && slices.ContainsFunc(sandboxes, func(id string) bool { return strings.Contains(line, id) }) {
			t.Errorf("the runtime says: %s", line)
		}
	}
	if left := traces(); len(left) > 0 {
		t.Errorf("left in the end: %v", left)
	}
}

func runtimeLog(t *testing.T) string {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(logDir(), "containerd.log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(log)
}

// As containerd 1.6 writes it, and as 2.x does.
var sandboxMade = regexp.MustCompile(`RunPodSandbox for .*[Uu]id:[\\"]*([0-9a-f-]{36}).* returns sandbox id [\\"]*([0-9a-f]{64})`)

// sandbox is the runtime's id of a pod.
func sandbox(t *testing.T, p *corev1.Pod) string {
	t.Helper()
	for _, m := range sandboxMade.FindAllStringSubmatch(runtimeLog(t), -1) {
		if m[1] == string(p.UID) {
			return m[2]
		}
	}
	t.Fatalf("the runtime's log has no sandbox of pod %s", p.Name)
	return ""
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
