// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// TestPrivilegedUserNamespace: the pod has its own user namespace, and the
// proxy's ids are those of that.
func TestPrivilegedUserNamespace(t *testing.T) {
	begin(t)
	modes(t, func(t *testing.T, n *node) {
		// The network namespace comes after the ids' map, as runtimes make it:
		// the kernel looks then who owns its files in /proc/net.
		cmd := exec.Command("unshare", "--net", "sleep", "1000")
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}}
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids,
			Credential: &syscall.Credential{Uid: 0, Gid: 0},
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		k := &testbed.Pod{Name: "pod", Namespace: "shop", UID: "1"}
		off := false
		policy := evaluate(t, redirect.DefaultConfig(), k, append(annotations(interceptionMode, "TPROXY"),
			testbed.ProxyEnv(dnsCaptureEnv, "true"), func(k *testbed.KubePod) { k.Spec.HostUsers = &off })...)
		target := redirect.Target{Attachment: redirect.Attachment{ContainerID: "users", IfName: "eth0"}, Netns: fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)}
		own, err := os.Readlink("/proc/self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		testbed.Eventually(t, "the pod's network namespace", func() bool {
			its, err := os.Readlink(target.Netns)
			return err == nil && its != own
		})
		ns, err := openNamespace(target.Netns)
		if err != nil {
			t.Fatal(err)
		}
		defer ns.close()
		if err := ns.route(func(h *netlink.Handle) error { return h.LinkSetUp(linkLo()) }); err != nil {
			t.Fatal(err)
		}
		before := n.children.Load()
		if err := n.Apply(t.Context(), target, policy); err != nil {
			t.Fatalf("apply: %v", err)
		}
		if k := n.children.Load() - before; k > 4 {
			t.Errorf("applying took %d programs", k)
		}
		for range 2 {
			if err := n.Check(t.Context(), target); err != nil {
				t.Errorf("check: %v", err)
			}
			if err := n.Apply(t.Context(), target, policy); err != nil {
				t.Fatalf("apply again: %v", err)
			}
		}
		// Without nsenter it says so.
		without := New(Options{RunDir: n.opts.RunDir, Mode: n.opts.Mode, Path: programs(t, n.opts.Mode, "")})
		if err := without.Check(t.Context(), target); err == nil || !strings.Contains(err.Error(), "nsenter") || !strings.Contains(err.Error(), "util-linux") {
			t.Errorf("without nsenter: %v", err)
		}
		if err := n.Remove(t.Context(), target.Attachment); err != nil {
			t.Errorf("remove: %v", err)
		}
		if there, err := ns.traces(); err != nil || there.nft {
			t.Errorf("left behind: %+v, %v", there, err)
		}
	})
}
