// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// The runtime calls the plugin three times for the end of a pod: at once, and
// when the kubelet collects the sandbox twice without a netns. All of them are
// good, and nothing is left after any.
//
// The kubelet collects once a minute. Other tests go on meanwhile; this one is the
// first of all, and uninstall waits for it: an uninstalled plugin is not called.
func TestDelete(t *testing.T) {
	install(t, defaults)
	var sandboxes []string
	for _, datapath := range []string{"ebpf", "iptables"} {
		p := start(t, meshed("ends-"+datapath, annotated(keyDatapath, datapath)))
		sandboxes = append(sandboxes, sandbox(t, p))
		deletePod(t, p.Name)
	}
	wantNoTraces(t)
	uncollected = sandboxes

	t.Parallel() // until every test that is not has ended
	awaitCollected(t)
	for line := range strings.Lines(runtimeLog(t)) {
		if strings.Contains(line, "failed to destroy network") && slices.ContainsFunc(sandboxes, func(id string) bool { return strings.Contains(line, id) }) {
			t.Errorf("the runtime says: %s", line)
		}
	}
	for _, id := range sandboxes {
		if left := records(id); len(left) > 0 {
			t.Errorf("left in the end of %s: %v", id[:12], left)
		}
	}
	if left := traces(); len(left) > 0 {
		t.Errorf("left in the end: %v", left)
	}
}

// uncollected are TestDelete's sandboxes, until the runtime has taken them down.
var uncollected []string

func awaitCollected(t *testing.T) {
	t.Helper()
	for _, id := range uncollected {
		eventually(t, patience, "the runtime has taken the network of "+id[:12]+" down three times", func() error {
			log := runtimeLog(t)
			if n := strings.Count(log, `TearDown network for sandbox \"`+id+`\" successfully`); n < 3 {
				return fmt.Errorf("%d times", n)
			}
			return nil
		})
	}
	uncollected = nil
}

func runtimeLog(t *testing.T) string {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(logDir(), "containerd.log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(log)
}

// As containerd 1.6 writes it, and as 2.x does. The UID of a static pod has no
// dashes.
var sandboxMade = regexp.MustCompile(`RunPodSandbox for .*[Uu]id:[\\"]*([0-9a-f-]{32,36}).* returns sandbox id [\\"]*([0-9a-f]{64})`)

// sandbox is the runtime's id of a pod, the last where it had several.
func sandbox(t *testing.T, p *corev1.Pod) (id string) {
	t.Helper()
	uid := string(p.UID)
	if own, static := p.Annotations[corev1.MirrorPodAnnotationKey]; static {
		uid = own // the API server's is the mirror's
	}
	for _, m := range sandboxMade.FindAllStringSubmatch(runtimeLog(t), -1) {
		if m[1] == uid {
			id = m[2]
		}
	}
	if id == "" {
		t.Fatalf("the runtime's log has no sandbox of pod %s", p.Name)
	}
	return id
}
