// SPDX-License-Identifier: Apache-2.0

//go:build linux

package repair

import (
	"errors"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"shunt.dev/shunt/internal/fakekube"
	"shunt.dev/shunt/internal/testbed"
)

// asCapped in the environment makes a controller give up every capability but
// those that it names, as numbers, before anything else; its bounding set too, as
// a container's is.
const asCapped = "SHUNT_TEST_CAPS"

// What the repair container needs for --repair-pods; see docs/OPERATIONS.md.
// SYS_ADMIN, without which nobody enters a network namespace, stands for BPF and
// PERFMON too.
var needed = map[string]int{
	"DAC_READ_SEARCH": unix.CAP_DAC_READ_SEARCH, "NET_ADMIN": unix.CAP_NET_ADMIN, "NET_RAW": unix.CAP_NET_RAW,
	"SYS_ADMIN": unix.CAP_SYS_ADMIN, "SYS_PTRACE": unix.CAP_SYS_PTRACE,
}

// confine gives up what is not in keep, for the program that this becomes.
func confine(keep []int) error {
	var data [2]unix.CapUserData
	for c := range unix.CAP_LAST_CAP + 1 {
		if slices.Contains(keep, c) {
			data[c/32].Effective |= 1 << (c % 32)
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	for i := range data {
		data[i].Permitted, data[i].Inheritable = data[i].Effective, 0
	}
	return unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0])
}

// start a controller with these capabilities.
func capped(caps map[string]int) func(*exec.Cmd) {
	var list []string
	for name := range caps {
		list = append(list, name)
	}
	return func(c *exec.Cmd) { c.Env = append(c.Env, asCapped+"="+strings.Join(list, ",")) }
}

// TestPrivilegedCapabilities: the controller mends a pod that runs, and whose
// proxy listens, by each backend with the capabilities that the documentation
// says; without any one of them it fails.
func TestPrivilegedCapabilities(t *testing.T) {
	trial := func(t *testing.T, backend, inbound string, caps map[string]int) (ok bool, log string) {
		b := makeBed(t)
		p, _ := b.start(t)
		proxy, app := p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID), p.StartApp(t, 8080)
		b.know(t, p, func(pod *corev1.Pod) {
			pod.Status.InitContainerStatuses = []corev1.ContainerStatus{{Name: "istio-validation", State: waiting, LastTerminationState: ended(exitMissing)}}
		})
		socket := b.cri.socket
		if inbound == "proc" {
			socket = b.dir + "/nosuch.sock"
		}
		c := startCommand(t, b.kubeconfig, b.conf(t, p, backendsOf[backend]), capped(caps), "--cri-socket", socket)
		eventually(t, "an outcome", func() bool { return len(reasons(b.kube, p.Name)) > 0 })
		if ok = slices.Contains(reasons(b.kube, p.Name), "RedirectionRepaired"); ok {
			wantRedirected(t, p, app, proxy)
		}
		if err := c.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		testbed.Eventually(t, "its end", func() bool { return c.ended() })
		b.cni.MustDel(t, p)
		fakekube.Remove[*corev1.Pod](b.kube, p.Namespace, p.Name)
		return ok, c.out.String()
	}
	for _, x := range [][2]string{{"ebpf", "runtime"}, {"ebpf-tc", "runtime"}, {"iptables-nft", "runtime"}, {"iptables-legacy", "runtime"}, {"ebpf", "proc"}} {
		t.Run(x[0]+" by "+x[1], func(t *testing.T) {
			if ok, log := trial(t, x[0], x[1], needed); !ok {
				t.Errorf("it fails:\n%s", log)
			}
		})
	}
	for name, where := range map[string][2]string{
		"DAC_READ_SEARCH": {"ebpf", "runtime"}, "NET_ADMIN": {"iptables-nft", "runtime"}, "NET_RAW": {"iptables-legacy", "runtime"},
		"SYS_ADMIN": {"ebpf", "runtime"}, "SYS_PTRACE": {"ebpf", "runtime"},
	} {
		t.Run("without "+name, func(t *testing.T) {
			fewer := map[string]int{}
			for n, c := range needed {
				if n != name {
					fewer[n] = c
				}
			}
			if ok, log := trial(t, where[0], where[1], fewer); ok {
				t.Errorf("it is not needed:\n%s", log)
			}
		})
	}
}
