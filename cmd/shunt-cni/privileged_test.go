// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/cni"
	"shunt.dev/shunt/internal/testbed"
)

// These tests run the built plugin as a container runtime does, with the real
// backend, and look at what it has left in the kernel and on disk.

// Environment that makes the test binary change its own process and then become
// the program that wrapped names. What a plugin is given by those who start it,
// a test can only take away in a process of its own.
const (
	wrapped    = "SHUNT_CNI_TEST_WRAPPED"
	holder     = "hold mounts"                 // in the place of a program
	wrapNoCaps = "SHUNT_CNI_TEST_WITHOUT_CAPS" // numbers of capabilities to do without
	wrapMounts = "SHUNT_CNI_TEST_MOUNTS_OF"    // a mount namespace to enter
	wrapNoBPF  = "SHUNT_CNI_TEST_WITHOUT_BPF"  // an errno, and the commands of bpf(2) that give it
	// not empty: a kernel without netns cookies
	wrapNoCookies = "SHUNT_CNI_TEST_WITHOUT_COOKIES"
	wrapUmask     = "SHUNT_CNI_TEST_UMASK"     // not empty: no umask at all
	allSteps      = "SHUNT_CNI_TEST_ALL_STEPS" // not empty: no sampling
	seedEnv       = "SHUNT_CNI_TEST_SEED"      // of the samples; random else
	quietRace     = "GORACE=atexit_sleep_ms=0" // a process with the race detector would rest for a second
	factsLimit    = "500ms"                    // podFactsTimeout where nobody answers
	addLimit      = 10 * time.Second           // what a failing ADD may take here, on a machine that is busy
	settleTime    = 10 * time.Second           // what the kernel may take to destroy closed sockets
	sampled       = 8                          // steps tried of a phase that is sampled
)

func init() {
	plugin := os.Getenv(wrapped)
	if plugin == "" {
		return
	}
	if plugin == holder {
		if err := holdOpen(); err != nil {
			fmt.Fprintln(os.Stderr, "hold mounts:", err)
			os.Exit(120)
		}
		os.Exit(0)
	}
	if err := becomeWrapped(plugin); err != nil {
		fmt.Fprintln(os.Stderr, "wrap the plugin:", err)
		os.Exit(120)
	}
}

// becomeWrapped runs on the process's first thread, as init functions do.
func becomeWrapped(plugin string) error {
	for _, c := range strings.Fields(os.Getenv(wrapNoCaps)) {
		n, err := strconv.Atoi(c)
		if err != nil {
			return err
		}
		// A program that root executes gets every capability of this set.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", n, err)
		}
	}
	if path := os.Getenv(wrapMounts); path != "" {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", path, err)
		}
		// Threads that share their working directory can't enter one.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare file system attributes: %w", err)
		}
		if err := unix.Setns(fd, unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter mount namespace: %w", err)
		}
	}
	if os.Getenv(wrapUmask) != "" {
		unix.Umask(0)
	}
	if refused := strings.Fields(os.Getenv(wrapNoBPF)); len(refused) > 0 {
		if err := refuseBPF(refused); err != nil {
			return fmt.Errorf("refuse bpf(2): %w", err)
		}
	}
	if os.Getenv(wrapNoCookies) != "" {
		if err := refuseCookies(); err != nil {
			return fmt.Errorf("refuse cookies: %w", err)
		}
	}
	return syscall.Exec(plugin, []string{plugin}, os.Environ())
}

// wrap has the plugin started by way of becomeWrapped.
func (n *node) wrap(t testing.TB, env ...string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	n.Env = append(append(n.Env, wrapped+"="+n.Plugin), env...)
	n.Plugin = exe
}

// without has the plugin run without some capabilities.
func (n *node) without(t testing.TB, caps ...int) {
	t.Helper()
	n.wrap(t, wrapNoCaps+"="+strings.Trim(fmt.Sprint(caps), "[]"))
}

// begin is the first line of a privileged test: it gives the world that the
// test's pods share, which answers wherever a pod connects to.
func begin(t *testing.T) *testbed.World {
	t.Helper()
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	return w
}

// node is a node that has just booted: no directory of the plugin's is there.
// When the test ends, nothing of any pod may be left on it.
type node struct {
	*testbed.CNI
	api   *testbed.APIServer
	world *testbed.World
}

func newNode(t testing.TB, w *testbed.World) *node {
	t.Helper()
	n := &node{CNI: testbed.NewCNI(t), api: testbed.NewAPIServer(t), world: w}
	n.Kubeconfig = n.api.WriteKubeconfig(t, t.TempDir())
	n.RunDir = filepath.Join(t.TempDir(), "run")
	t.Cleanup(func() { n.expectNothing(t) })
	return n
}

// pod makes a pod of the mesh, which the API server knows.
func (n *node) pod(t testing.TB, opts ...testbed.Option) *testbed.Pod {
	t.Helper()
	p := testbed.NewPod(t, append([]testbed.Option{testbed.InWorld(n.world)}, opts...)...)
	n.api.SetPod(t, p.Namespace, p.Name, p.Injected())
	return p
}

// heavyPod makes a pod of the mesh that needs all that eBPF does for a pod: DNS
// capture and TPROXY mode.
func (n *node) heavyPod(t testing.TB) *testbed.Pod {
	t.Helper()
	p := testbed.NewPod(t, testbed.InWorld(n.world))
	n.api.SetPod(t, p.Namespace, p.Name, p.Injected(
		testbed.Annotate("sidecar.istio.io/interceptionMode", "TPROXY"), testbed.ProxyEnv("ISTIO_META_DNS_CAPTURE", "true")))
	return p
}

// expectMarks fails the test unless TPROXY mode's changes to a pod's network
// namespace are there, or are not.
func expectMarks(t testing.TB, p *testbed.Pod, there bool) {
	t.Helper()
	want := 0
	if there {
		want = 2
	}
	if got := strings.Count(p.Command(t, "ip", "rule")+p.Command(t, "ip", "-6", "rule"), "fwmark 0x539"); got != want {
		t.Errorf("pod %s: %d rules for the mark, want %d", p.Name, got, want)
	}
	if err := p.Do(func() error {
		for _, key := range []string{"ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"} {
			v, err := os.ReadFile("/proc/sys/net/" + key)
			if err != nil {
				return err
			}
			if on := strings.TrimSpace(string(v)) == "1"; on != there {
				t.Errorf("pod %s: sysctl %s is %s", p.Name, key, v)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// podMaps have entries for pods; those of the second kind are their sockets',
// and go when the kernel has destroyed these.
var (
	podMaps    = []string{bpf.ShuntMapPods, bpf.ShuntMapStates, bpf.ShuntMapDests, bpf.ShuntMapPorts}
	socketMaps = []string{bpf.ShuntMapInflight, bpf.ShuntMapListeners}
)

// entries counts the keys of a pinned map; 0 where no datapath is loaded.
func (n *node) entries(t testing.TB, name string) (count int) {
	t.Helper()
	for _, path := range glob(t, filepath.Join(n.BPFDir, "datapath-*", name)) {
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for key, err := m.NextKeyBytes(nil); key != nil || err != nil; key, err = m.NextKeyBytes(key) {
			if err != nil {
				t.Fatalf("list the keys of map %s: %v", name, err)
			}
			count++
		}
		m.Close()
	}
	return count
}

func glob(t testing.TB, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// nodeFiles are the node's own in its run directory: locks, and what was found
// out about it.
var nodeFiles = []string{"log", "lock", "refused", "iptables/lock", "iptables-backend", "status"}

// left lists what is left on the node of any pod, and of the given ones in
// their cgroup and network namespace.
func (n *node) left(t testing.TB, pods ...*testbed.Pod) []string {
	t.Helper()
	var left []string
	for _, name := range slices.Concat(podMaps, socketMaps) {
		if count := n.entries(t, name); count > 0 {
			left = append(left, fmt.Sprintf("%d entries of map %s", count, name))
		}
	}
	if slots := n.stamped(t); len(slots) > 0 {
		left = append(left, fmt.Sprintf("stamps %v in use", slots))
	}
	for _, dir := range []string{n.BPFDir, n.RunDir} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			rel, _ := filepath.Rel(dir, path) // it lies below
			switch {
			case err != nil:
				return err
			case d.IsDir() && dir == n.BPFDir && strings.HasPrefix(rel, "datapath-"):
				return fs.SkipDir
			case d.IsDir() && filepath.Dir(rel) == "." && !strings.HasPrefix(rel, "load-"): // the node's folders stay
			case dir == n.RunDir && slices.Contains(nodeFiles, rel): // and its files
			default:
				left = append(left, path)
			}
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	for _, p := range pods {
		for hook, count := range hooksOf(t, p) {
			left = append(left, fmt.Sprintf("%d programs at %s of pod %s", count, hook, p.Name))
		}
	}
	return left
}

// stamped lists the slots of the stamp programs that serve a pod.
func (n *node) stamped(t testing.TB) (slots []uint32) {
	t.Helper()
	for _, path := range glob(t, filepath.Join(n.BPFDir, "datapath-*", bpf.ShuntMapSlots)) {
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		var slot uint32
		var cookie, highest uint64
		// The first holds how many there are.
		if err := m.Lookup(slot, &highest); err != nil {
			t.Fatalf("look up the highest slot: %v", err)
		}
		for slot = 1; uint64(slot) <= highest; slot++ {
			if err := m.Lookup(slot, &cookie); err != nil {
				t.Fatalf("look up slot %d: %v", slot, err)
			}
			if cookie != 0 {
				slots = append(slots, slot)
			}
		}
		m.Close()
	}
	return slots
}

// drain takes away the stamp programs that no pod has, so that the next ADD has
// to load one of its own.
func (n *node) drain(t testing.TB) {
	t.Helper()
	for _, path := range glob(t, filepath.Join(n.BPFDir, "datapath-*", "free", "*")) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// expectNothing fails the test if anything is left.
func (n *node) expectNothing(t testing.TB, pods ...*testbed.Pod) {
	t.Helper()
	n.expectOnly(t, func(string) bool { return false }, pods...)
}

// expectOnly fails the test if something is left that is not allowed.
func (n *node) expectOnly(t testing.TB, allowed func(string) bool, pods ...*testbed.Pod) {
	t.Helper()
	var left []string
	testbed.Poll(settleTime, func() bool {
		left = slices.DeleteFunc(n.left(t, pods...), allowed)
		return !slices.ContainsFunc(left, func(s string) bool {
			return slices.ContainsFunc(socketMaps, func(m string) bool { return strings.HasSuffix(s, "of map "+m) })
		})
	})
	if len(left) > 0 {
		t.Errorf("left behind:\n\t%s", strings.Join(left, "\n\t"))
	}
}

// expectUnruled fails the test if iptables has rules of ours in a pod on a node
// whose pods are redirected by them.
func (n *node) expectUnruled(t testing.TB, p *testbed.Pod) {
	t.Helper()
	if n.Config["datapath"] == "iptables" && ruled(t, p) {
		t.Errorf("pod %s: rules are left", p.Name)
	}
}

// cutShort tells what a plugin that was killed may leave until the next ADD
// clears it away: a record and a datapath that had no name yet.
func cutShort(left string) bool {
	return filepath.Base(left) == ".next" || strings.Contains(left, "/load-")
}

// podHooks are the attach types of a redirected pod's cgroup.
var podHooks = []ebpf.AttachType{
	ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCgroupInet4GetPeername,
	ebpf.AttachCgroupInet6GetPeername, ebpf.AttachCGroupGetsockopt, ebpf.AttachCGroupSockOps,
}

// dnsHooks are those that a pod with DNS capture has besides.
var dnsHooks = []ebpf.AttachType{
	ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg, ebpf.AttachCGroupUDP4Recvmsg, ebpf.AttachCGroupUDP6Recvmsg,
}

// hooksOf counts the programs at each hook of a pod that has any.
func hooksOf(t testing.TB, p *testbed.Pod) map[string]int {
	t.Helper()
	found := map[string]int{}
	count := func(path string, types ...ebpf.AttachType) {
		t.Helper()
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for _, typ := range types {
			q, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: typ})
			if err != nil {
				t.Fatalf("query %v of %s: %v", typ, path, err)
			}
			if len(q.Programs) > 0 {
				found[typ.String()] = len(q.Programs)
			}
		}
	}
	count(p.CgroupPath(), slices.Concat(podHooks, dnsHooks)...)
	count(p.NetnsPath(), ebpf.AttachSkLookup)
	return found
}

// expectHooks fails the test unless a pod has each program that it needs, once;
// more are those that it needs besides what every pod does.
func expectHooks(t testing.TB, p *testbed.Pod, more ...ebpf.AttachType) {
	t.Helper()
	got := hooksOf(t, p)
	want := map[string]int{ebpf.AttachSkLookup.String(): 2} // the stamp and the program that all pods share
	for _, typ := range slices.Concat(podHooks, more) {
		want[typ.String()] = 1
	}
	for hook, n := range want {
		if got[hook] != n {
			t.Errorf("pod %s: %d programs at %s, want %d", p.Name, got[hook], hook, n)
		}
	}
}

// prevResult is what ADD must print.
func prevResult(t testing.TB, p *testbed.Pod, version string) string {
	t.Helper()
	b, err := json.Marshal(p.PrevResult(version))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// flows makes a connection of each family out of a pod and into it, and gives
// for each who served it, and where it was going by SO_ORIGINAL_DST there.
func (n *node) flows(t testing.TB, p *testbed.Pod, app *testbed.Actor) (got, want []string) {
	t.Helper()
	one := func(r testbed.ConnectResult, listener string, dst netip.AddrPort) {
		t.Helper()
		text := fmt.Sprintf("%s: %s%s", dst, r.Errno, r.Step)
		if r.Served != nil {
			o := r.Served.OrigDst().Addr
			text = fmt.Sprintf("%s: served by %s, was going to %s", dst, r.Listener(), netip.AddrPortFrom(o.Addr().Unmap(), o.Port()))
		}
		got = append(got, text)
		want = append(want, fmt.Sprintf("%s: served by %s, was going to %s", dst, listener, dst))
	}
	for _, s := range []string{"10.99.3.4:80", "[fd99::3]:443"} {
		dst := netip.MustParseAddrPort(s)
		one(app.Connect(t, testbed.ConnectSpec{Dst: dst, Abort: true}), "out", dst)
	}
	for _, a := range p.AllAddrs() {
		dst := netip.AddrPortFrom(a, 8080)
		one(n.world.Connect(t, testbed.ConnectSpec{Dst: dst, Abort: true}), "in", dst)
	}
	return got, want
}

// expectRedirected fails the test unless the pod's connections, both ways and
// of both families, reach the proxy's listeners, which are told where they were
// going. One actor plays both parts, as a user who is not the proxy's.
func (n *node) expectRedirected(t testing.TB, p *testbed.Pod) {
	t.Helper()
	a := p.Actor(t, "pod", testbed.AppUID, testbed.AppGID)
	a.Listen(t, testbed.ListenSpec{Name: "out", Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), testbed.OutboundPort)})
	a.Listen(t, testbed.ListenSpec{Name: "in", Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), testbed.InboundPort)})
	got, want := n.flows(t, p, a)
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("pod %s: to %s; want %s", p.Name, got[i], want[i])
		}
	}
	a.Stop(t)
}

func TestPrivilegedAdd(t *testing.T) {
	w := begin(t)
	n := newNode(t, w)

	t.Run("life", func(t *testing.T) {
		p := n.pod(t)
		if r := n.MustAdd(t, p); string(r.Stdout) != prevResult(t, p, "1.1.0") || len(r.Stderr) != 0 {
			t.Errorf("ADD: %s", r)
		}
		app, proxy := p.StartApp(t, 8080), p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID)
		got, want := n.flows(t, p, app.Actor)
		for i := range want {
			if got[i] != want[i] {
				t.Errorf("to %s; want %s", got[i], want[i])
			}
		}
		for _, dst := range []string{"10.99.3.4:80", "[fd99::3]:443"} {
			if r := proxy.Dial(t, dst); r.Listener() != "world" {
				t.Errorf("the proxy's own to %s: %q at %q from %q", dst, r.Errno, r.Step, r.Listener())
			}
		}
		expectHooks(t, p)
		if r := n.MustCheck(t, p); len(r.Stdout) != 0 {
			t.Errorf("CHECK: %s", r)
		}
		if r := n.MustAdd(t, p); string(r.Stdout) != prevResult(t, p, "1.1.0") {
			t.Errorf("ADD again: %s", r)
		}
		expectHooks(t, p)
		n.MustCheck(t, p)

		if r := n.MustDel(t, p); len(r.Stdout) != 0 {
			t.Errorf("DEL: %s", r)
		}
		for _, r := range []testbed.ConnectResult{
			app.Dial(t, "10.99.3.4:80"), app.Dial(t, "[fd99::3]:443"),
		} {
			if r.Listener() != "world" {
				t.Errorf("after DEL: %q at %q from %q", r.Errno, r.Step, r.Listener())
			}
		}
		if r := n.Check(t, p); r.Code() != cni.CodeDiffers || !strings.Contains(r.Err.Msg, "not attached") {
			t.Errorf("CHECK after DEL: %s", r)
		}
		proxy.Stop(t)
		app.Stop(t)
		n.expectNothing(t, p)
		n.MustDel(t, p)
		n.MustDel(t, p, testbed.LateDel())
		n.expectNothing(t, p)
	})

	t.Run("late DEL is the only one", func(t *testing.T) {
		p := n.pod(t)
		n.MustAdd(t, p)
		n.expectRedirected(t, p)
		p.Destroy(t)
		p.RemoveCgroup(t)
		n.api.DeletePod(p.Namespace, p.Name)
		n.MustDel(t, p, testbed.LateDel())
		n.expectNothing(t, p)
	})

	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			p := n.pod(t)
			as := func(i *testbed.Invocation) {
				i.Config["cniVersion"], i.Config["prevResult"] = version, p.PrevResult(version)
			}
			if r := n.MustAdd(t, p, as); string(r.Stdout) != prevResult(t, p, version) {
				t.Errorf("ADD of %s: %s", prevResult(t, p, version), r)
			}
			n.expectRedirected(t, p)
			switch r := n.Check(t, p, as); {
			case strings.HasPrefix(version, "0.3.") && r.Code() != 1: // the command came with 0.4.0
				t.Errorf("CHECK: %s", r)
			case !strings.HasPrefix(version, "0.3.") && !r.OK():
				t.Errorf("CHECK: %s", r)
			}
			n.MustDel(t, p, as)
			n.expectNothing(t, p)
		})
	}

	t.Run("standalone", func(t *testing.T) {
		p := n.pod(t)
		if r := n.MustAdd(t, p, testbed.Unset("prevResult")); string(r.Stdout) != `{"cniVersion":"1.1.0"}` {
			t.Errorf("ADD: %s", r)
		}
		n.expectRedirected(t, p)
		n.MustCheck(t, p, testbed.Unset("prevResult"))
		n.MustDel(t, p, testbed.Unset("prevResult"))
		n.expectNothing(t, p)
	})

	t.Run("CNI_ARGS in any order", func(t *testing.T) {
		p := n.pod(t)
		args := []string{
			"K8S_POD_UID=" + p.UID, "IgnoreUnknown=1", "K8S_POD_NAME=" + p.Name, "OTHER=x=y",
			"K8S_POD_INFRA_CONTAINER_ID=" + p.ContainerID, "K8S_POD_NAMESPACE=" + p.Namespace,
		}
		for i := range args {
			order := strings.Join(slices.Concat(args[i:], args[:i]), ";")
			n.MustAdd(t, p, func(i *testbed.Invocation) { i.Env = append(i.Env, "CNI_ARGS="+order) })
			expectHooks(t, p)
			n.MustDel(t, p)
			n.expectNothing(t, p)
		}
	})
}

// TestPrivilegedNotInMesh: a pod that is left alone costs nothing, not even the
// load of the datapath.
func TestPrivilegedNotInMesh(t *testing.T) {
	w := begin(t)
	plain := func(k *testbed.KubePod) {
		k.Metadata.Annotations = nil
		k.Spec.Containers = k.Spec.Containers[:1]
	}
	for _, c := range []struct {
		name      string
		opts      []testbed.Option
		mutators  []testbed.PodMutator
		overrides []testbed.Override
		unasked   bool // nothing may be needed to know, and the API server not be asked
	}{
		{name: "no sidecar", mutators: []testbed.PodMutator{plain}},
		{name: "injection refused", mutators: []testbed.PodMutator{testbed.Label("sidecar.istio.io/inject", "false")}},
		{name: "interception mode NONE", mutators: []testbed.PodMutator{testbed.Annotate("sidecar.istio.io/interceptionMode", "NONE")}},
		{name: "on the host's network", mutators: []testbed.PodMutator{func(k *testbed.KubePod) { k.Spec.HostNetwork = true }}},
		{name: "excluded namespace", opts: []testbed.Option{testbed.Named("kube-system", "dns")}, unasked: true},
		{
			name: "excluded by name", opts: []testbed.Option{testbed.Named("mine", "a")}, unasked: true,
			overrides: []testbed.Override{testbed.Set("excludeNamespaces", []string{"yours", "mine"})},
		},
		{name: "not of Kubernetes", unasked: true, overrides: []testbed.Override{testbed.NoArg("K8S_POD_NAME"), testbed.NoArg("K8S_POD_NAMESPACE"), testbed.NoArg("K8S_POD_UID")}},
		{name: "no CNI_ARGS", unasked: true, overrides: []testbed.Override{func(i *testbed.Invocation) { clear(i.Args) }}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, w)
			if c.unasked {
				n.Kubeconfig = "/none/such"
			}
			p := n.pod(t, c.opts...)
			n.api.SetPod(t, p.Namespace, p.Name, p.Injected(c.mutators...))
			expectUntouched := func(after string) {
				t.Helper()
				if entries := len(glob(t, n.BPFDir)) + len(glob(t, filepath.Join(n.RunDir, "*"))); entries != 0 {
					t.Errorf("after %s: %q, %q", after, glob(t, n.BPFDir), glob(t, filepath.Join(n.RunDir, "*")))
				}
				if h := hooksOf(t, p); len(h) > 0 {
					t.Errorf("after %s: %v", after, h)
				}
			}
			if r := n.MustAdd(t, p, c.overrides...); string(r.Stdout) != prevResult(t, p, "1.1.0") || len(r.Stderr) != 0 {
				t.Errorf("ADD: %s", r)
			}
			expectUntouched("ADD")
			app := p.StartApp(t)
			if r := app.Dial(t, "10.99.3.4:80"); r.Listener() != "world" {
				t.Errorf("its traffic: %q at %q from %q", r.Errno, r.Step, r.Listener())
			}
			if r := n.Check(t, p, c.overrides...); !r.OK() {
				t.Errorf("CHECK: %s", r)
			}
			n.MustDel(t, p, c.overrides...)
			n.MustDel(t, p, append(c.overrides, testbed.LateDel())...)
			expectUntouched("DEL")
			if asked := len(n.api.Requests()); (asked == 0) != c.unasked {
				t.Errorf("the API server was asked %d times", asked)
			}
		})
	}
}

func TestPrivilegedBadAdd(t *testing.T) {
	w := begin(t)
	annotated := func(key, value string) func(*testing.T, *node, *testbed.Pod) []testbed.Override {
		return func(t *testing.T, n *node, p *testbed.Pod) []testbed.Override {
			n.api.SetPod(t, p.Namespace, p.Name, p.Injected(testbed.Annotate(key, value)))
			return nil
		}
	}
	set := func(key string, value any) func(*testing.T, *node, *testbed.Pod) []testbed.Override {
		return func(*testing.T, *node, *testbed.Pod) []testbed.Override {
			return []testbed.Override{testbed.Set(key, value)}
		}
	}
	answer := func(f testbed.APIFault) func(*testing.T, *node, *testbed.Pod) []testbed.Override {
		return func(_ *testing.T, n *node, _ *testbed.Pod) []testbed.Override { n.api.FailAlways(f); return nil }
	}
	netns := func(path string) func(*testing.T, *node, *testbed.Pod) []testbed.Override {
		return func(*testing.T, *node, *testbed.Pod) []testbed.Override {
			return []testbed.Override{func(i *testbed.Invocation) { i.Netns = path }}
		}
	}
	without := func(caps ...int) func(*testing.T, *node, *testbed.Pod) []testbed.Override {
		return func(t *testing.T, n *node, _ *testbed.Pod) []testbed.Override { n.without(t, caps...); return nil }
	}
	for _, c := range []struct {
		name  string
		make  func(*testing.T, *node, *testbed.Pod) []testbed.Override
		code  uint
		names []string // what the message must have in it
	}{
		{
			"bad JSON", func(*testing.T, *node, *testbed.Pod) []testbed.Override {
				return []testbed.Override{testbed.Stdin([]byte(`{"cniVersion": "1.1.0", "name": "x", "type": "shunt-cni", `))}
			}, 6, []string{"JSON"},
		},
		{"unknown key", set("logLevl", "info"), 7, []string{`"logLevl"`, "no such key"}},
		{"bad value", set("podFactsTimeout", "soon"), 7, []string{"podFactsTimeout", `"soon"`}},
		{"bad nested value", set("proxy", map[string]any{"uid": -1}), 7, []string{"proxy.uid", "-1"}},
		{"bad prevResult", set("prevResult", map[string]any{"cniVersion": "1.1.0", "ips": []any{map[string]any{"address": "10.1.1"}}}), 6, []string{"prevResult", "10.1.1"}},
		{"bad CIDR", annotated("traffic.sidecar.istio.io/includeOutboundIPRanges", "10.0.0.0/8,10.1.0.0/33"), 7, []string{"includeOutboundIPRanges", "10.1.0.0/33"}},
		{"bad port", annotated("traffic.sidecar.istio.io/excludeOutboundPorts", "80,65536"), 7, []string{"excludeOutboundPorts", "65536"}},
		{"bad mode", annotated("sidecar.istio.io/interceptionMode", "MAGIC"), 7, []string{"interceptionMode", "MAGIC"}},
		{"bad choice", annotated("shunt.dev/datapath", "magic"), 7, []string{"shunt.dev/datapath", "magic"}},
		{
			"no kubeconfig", func(_ *testing.T, n *node, _ *testbed.Pod) []testbed.Override {
				n.Kubeconfig = "/none/such"
				return nil
			},
			11,
			[]string{"/none/such", "no such file"},
		},
		{"API answers 500", answer(testbed.APIFault{Status: 500, Message: "etcd is on fire"}), 11, []string{"500", "etcd is on fire"}},
		{"API answers 403", answer(testbed.APIFault{Status: 403, Message: "not for you"}), 11, []string{"403", "not for you"}},
		{"API hangs", answer(testbed.APIFault{Hang: true}), 11, []string{"deadline exceeded"}},
		{"API hangs up", answer(testbed.APIFault{Drop: true}), 11, []string{"EOF"}},
		{
			"wrong pod UID", func(*testing.T, *node, *testbed.Pod) []testbed.Override {
				return []testbed.Override{testbed.Arg("K8S_POD_UID", "11111111-2222-3333-4444-555555555555")}
			}, 11, []string{"11111111-2222-3333-4444-555555555555", "K8S_POD_UID"},
		},
		{
			"unknown pod", func(_ *testing.T, n *node, p *testbed.Pod) []testbed.Override {
				n.api.DeletePod(p.Namespace, p.Name)
				return nil
			}, 11, []string{"not found"},
		},
		{
			"no pod cgroup", func(t *testing.T, _ *node, p *testbed.Pod) []testbed.Override { p.RemoveCgroup(t); return nil },
			cni.CodeProgram,
			[]string{"no cgroup of the pod", "cgroupPath"},
		},
		{
			"no cgroup2", set("cgroupRoot", "/proc"), cni.CodeProgram, []string{"cgroupRoot", "/proc", "cgroup2"},
		},
		{
			"bpfDir not on a bpffs", func(t *testing.T, n *node, _ *testbed.Pod) []testbed.Override {
				n.BPFDir = filepath.Join(t.TempDir(), "some", "where")
				return nil
			}, cni.CodeProgram, []string{"bpfDir", "/some/where is not in one", "no bpffs", "mount -t bpf"},
		},
		{"no such netns", netns("/none/such"), 8, []string{"/none/such", "no such file"}},
		{"netns is no netns", netns("/proc/version"), 8, []string{"/proc/version is not a network namespace"}},
		{"netns is another namespace", netns("/proc/self/ns/uts"), 8, []string{"/proc/self/ns/uts is not a network namespace"}},
		{"netns is the host's", netns("/proc/thread-self/ns/net"), 8, []string{"host's own"}},
		{"netns is the parent's", netns(fmt.Sprintf("/proc/%d/ns/net", os.Getpid())), 8, []string{"host's own"}},
		{"no netns", netns(""), 4, []string{"CNI_NETNS"}},
		{
			"EPERM to enter", without(unix.CAP_SYS_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON), cni.CodeProgram,
			[]string{"operation not permitted", "network namespace"},
		},
		{
			"EPERM to configure", without(unix.CAP_NET_ADMIN), cni.CodeProgram, []string{"operation not permitted", "::6"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, w)
			n.Config = map[string]any{"datapath": "ebpf"} // nobody takes over
			p := n.pod(t)
			// A pod that is there already must not notice.
			other := n.pod(t)
			n.MustAdd(t, other)
			before := n.left(t)
			config, bpfDir, env, plugin, kubeconfig := n.Config, n.BPFDir, n.Env, n.Plugin, n.Kubeconfig
			var overrides []testbed.Override
			if c.code == 11 {
				limit := "3s" // in which one answer comes, by TLS and under -race
				if c.name == "API hangs" || c.name == "no kubeconfig" {
					limit = factsLimit
				}
				overrides = append(overrides, testbed.Set("podFactsTimeout", limit))
			}
			overrides = append(overrides, c.make(t, n, p)...)
			r := n.Add(t, p, overrides...)
			// The bound may fall into a call, whose dial then is what is told of.
			for range 3 {
				if c.code != 11 || !strings.Contains(message(r), "i/o timeout") {
					break
				}
				r = n.Add(t, p, overrides...)
			}
			t.Logf("code %d after %v: %s", r.Code(), r.Elapsed.Round(time.Millisecond), message(r))
			if r.ExitCode != 1 || r.Err == nil || r.Code() != c.code {
				t.Fatalf("want one error of code %d: %s", c.code, r)
			}
			for _, what := range c.names {
				if !strings.Contains(message(r), what) {
					t.Errorf("the message does not say %q", what)
				}
			}
			if r.Elapsed > addLimit {
				t.Errorf("it took %v", r.Elapsed)
			}
			n.Config, n.BPFDir, n.Env, n.Plugin, n.Kubeconfig = config, bpfDir, env, plugin, kubeconfig
			n.api.Fail()
			expectSame := func(after string) {
				t.Helper()
				now := n.left(t)
				slices.Sort(now)
				slices.Sort(before)
				if h := hooksOf(t, p); !slices.Equal(now, before) || len(h) > 0 {
					t.Errorf("after %s: %q; before: %q; hooks: %v", after, now, before, h)
				}
			}
			expectSame("ADD")
			// As the runtime does after a failed ADD.
			n.MustDel(t, p, testbed.Unset("prevResult"))
			expectSame("DEL")
			n.MustCheck(t, other)
			n.MustDel(t, other)
		})
	}
}

// message is all that an error says.
func message(r testbed.CNIResult) string {
	if r.Err == nil {
		return ""
	}
	return strings.TrimSuffix(r.Err.Msg+": "+r.Err.Details, ": ")
}

// TestPrivilegedOtherBuild: a datapath of another build that no pod uses is
// replaced, as is a load that was not finished.
func TestPrivilegedOtherBuild(t *testing.T) {
	n := newNode(t, begin(t))
	p := n.pod(t)
	n.MustAdd(t, p)
	n.MustDel(t, p)
	own := glob(t, n.BPFDir+"/datapath-*")
	if len(own) != 1 {
		t.Fatalf("datapaths: %q", own)
	}
	other := n.BPFDir + "/datapath-0123456789abcdef"
	if err := os.Rename(own[0], other); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(n.BPFDir+"/load-1", 0o700); err != nil {
		t.Fatal(err)
	}
	n.MustAdd(t, p)
	n.expectRedirected(t, p)
	if now := glob(t, n.BPFDir+"/*-*"); !slices.Equal(now, own) {
		t.Errorf("datapaths: %q, want %q", now, own)
	}
	n.MustDel(t, p)
	n.expectNothing(t, p)
}

// TestPrivilegedOtherLayout: pods of a build whose maps are laid out otherwise keep
// its programs until they end. ADD refuses what would have to write its maps, and all
// else works.
func TestPrivilegedOtherLayout(t *testing.T) {
	n := newNode(t, begin(t))
	n.Config = map[string]any{"datapath": "ebpf"} // nobody takes over
	old, fresh := n.pod(t), n.pod(t)
	n.MustAdd(t, old)
	own := glob(t, n.BPFDir+"/datapath-*")
	records := glob(t, n.RunDir+"/attachments/*.json")
	if len(own) != 1 || len(records) != 1 {
		t.Fatalf("datapaths: %q, records: %q; want one of each", own, records)
	}
	// It has been another build's all along.
	other, layout := n.BPFDir+"/datapath-0123456789abcdef", own[0]+"/layout"
	record, err := os.ReadFile(records[0])
	if err != nil {
		t.Fatal(err)
	}
	record = bytes.ReplaceAll(record, []byte(filepath.Base(own[0])), []byte(filepath.Base(other)))
	err = errors.Join(
		os.WriteFile(records[0], record, 0o600),
		os.Remove(layout), os.Symlink(strings.Replace(bpf.Layout, "meaning=", "meaning=not", 1), layout),
		os.Rename(own[0], other),
	)
	if err != nil {
		t.Fatal(err)
	}
	keeps := func() {
		t.Helper()
		n.MustCheck(t, old)
		expectHooks(t, old)
		n.expectRedirected(t, old)
	}

	n.MustAdd(t, fresh)
	n.MustCheck(t, fresh)
	n.expectRedirected(t, fresh)
	keeps()
	second := *old
	second.ContainerID = "second"
	r := n.Add(t, &second)
	if r.Code() != cni.CodeProgram || !strings.Contains(message(r), "another build") || !strings.Contains(message(r), "whose maps this one has not") {
		t.Errorf("ADD to the network namespace of a pod of another build: %s; want an error of code %d that says so", r, cni.CodeProgram)
	}
	n.MustDel(t, &second)
	keeps()

	n.MustDel(t, old)
	n.MustDel(t, fresh)
	n.expectNothing(t, old, fresh)
	// Nobody uses it any more.
	if r := n.Run(t, "GC", nil, testbed.Set("cni.dev/valid-attachments", []any{})); !r.OK() {
		t.Errorf("GC: %s", r)
	}
	if now := glob(t, n.BPFDir+"/datapath-*"); !slices.Equal(now, own) {
		t.Errorf("datapaths: %q, want %q", now, own)
	}
}

// holdMounts starts a process in a mount namespace of its own, in which nothing
// is mounted at /sys/fs/bpf, and gives the process's folder in /proc. A thread
// would not do: the process's first, which may be the one that is taken, can't
// end before the process does.
func holdMounts(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{wrapped + "=" + holder, quietRace}
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // which makes the mounts private, too
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
			t.Errorf("the holder of the mounts: %v", err)
		}
	})
	if _, err := io.ReadFull(out, make([]byte, len(holder))); err != nil {
		t.Fatalf("wait for the holder of the mounts: %v", err)
	}
	return fmt.Sprintf("/proc/%d", cmd.Process.Pid)
}

// holdOpen is the process of holdMounts.
func holdOpen() error {
	for {
		var st unix.Statfs_t
		if err := unix.Statfs("/sys/fs/bpf", &st); err != nil {
			return fmt.Errorf("statfs: %w", err)
		}
		if st.Type != unix.BPF_FS_MAGIC {
			break
		}
		if err := unix.Unmount("/sys/fs/bpf", unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount bpffs: %w", err)
		}
	}
	if _, err := io.WriteString(os.Stdout, holder); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, os.Stdin) // until the test closes its end
	return err
}

// TestPrivilegedMountsBPFFS: where no bpffs is mounted at its usual place, the
// plugin mounts one. This happens in a mount namespace of the test's own.
func TestPrivilegedMountsBPFFS(t *testing.T) {
	w := begin(t)
	booted := newNode(t, w)
	p := booted.pod(t)

	ns := holdMounts(t)
	// n is the node as the plugin sees it; seen is the same as this process can
	// see it.
	in := func(bpfDir string) *node {
		cni := *booted.CNI
		cni.BPFDir = bpfDir
		return &node{CNI: &cni, api: booted.api, world: w}
	}
	n, seen := in("/sys/fs/bpf/shunt"), in(ns+"/root/sys/fs/bpf/shunt")
	n.wrap(t, wrapMounts+"="+ns+"/ns/mnt")
	n.MustAdd(t, p)
	var st unix.Statfs_t
	if err := unix.Statfs(ns+"/root/sys/fs/bpf", &st); err != nil || st.Type != unix.BPF_FS_MAGIC {
		t.Errorf("file system of type %#x at /sys/fs/bpf, %v", st.Type, err)
	}
	if info, err := os.Stat(seen.BPFDir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("bpfDir: %v, %v", info, err)
	}
	expectHooks(t, p)
	n.expectRedirected(t, p)
	n.MustCheck(t, p)
	// It is mounted once.
	other := n.pod(t)
	n.MustAdd(t, other, func(i *testbed.Invocation) {
		// Made after the mount namespace was: its file is not there.
		i.Netns = fmt.Sprintf("/proc/%d/ns/net", other.Actor(t, "pause", 0, 0).PID)
	})
	n.MustDel(t, other)
	n.MustDel(t, p)
	seen.expectNothing(t, p, other)
	mounts, err := os.ReadFile(ns + "/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(string(mounts), " /sys/fs/bpf "); got != 1 {
		t.Errorf("%d mounts at /sys/fs/bpf", got)
	}
}

// full says that each and every step is to be tried.
func full() bool { return os.Getenv(allSteps) != "" }

// raced says that the plugin has the race detector: it is slow then, and linked
// with libc.
func raced() bool { return os.Getenv(testbed.RaceEnv) != "" }

// sweep runs try for step 1, 2, … in a subtest each, until the process ends
// before it has come to that step. choose, if not nil, picks steps.
func sweep(t *testing.T, choose func(step int) bool, try func(t *testing.T, step int) testbed.StepsResult) (tried int, last testbed.StepsResult) {
	t.Helper()
	if choose == nil && raced() && !full() {
		choose = func(step int) bool { return step%5 == 1 } // odd and even ones
	}
	failed := 0
	for step, hit := 1, true; hit; step++ {
		if choose != nil && !choose(step) {
			continue
		}
		ok := t.Run(strconv.Itoa(step), func(t *testing.T) {
			r := try(t, step)
			if t.Failed() && len(r.Steps) > 0 {
				t.Logf("steps, the last with the fault:\n\t%s", join(r.Steps))
			}
			if hit, last = r.Hit, r; hit {
				tried++
			}
		})
		if !ok {
			if failed++; failed == 5 {
				t.Fatal("enough has failed")
			}
		}
	}
	return tried, last
}

func join(steps []testbed.Step) string {
	var lines []string
	for i, s := range steps {
		lines = append(lines, fmt.Sprintf("%d %v", i+1, s))
	}
	return strings.Join(lines, "\n\t")
}

// sample chooses steps of a first ADD after a boot: some of those before the
// load makes anything that outlives the process, of those in which it does, and
// of those after it, which a later ADD has too. Those that make the node's
// folders, and the first and the last step of the load, are always among them.
func sample(t *testing.T, all testbed.StepsResult) func(step int) bool {
	t.Helper()
	if full() {
		return nil
	}
	seed := rand.Uint64()
	if s := os.Getenv(seedEnv); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("%s: %v", seedEnv, err)
		}
	}
	isLoad := func(s testbed.Step) bool { return strings.Contains(s.Arg, "/load-") }
	steps := slices.Clone(all.Steps)
	first := slices.IndexFunc(steps, isLoad) + 1
	slices.Reverse(steps)
	last := len(steps) - slices.IndexFunc(steps, isLoad)
	if first == 0 || last > len(steps) {
		t.Fatalf("no load is seen among the steps:\n\t%s", join(all.Steps))
	}
	chosen := map[int]bool{first: true, first + 1: true, last - 1: true, last: true, last + 1: true}
	for i, s := range all.Steps {
		if slices.Contains([]string{"mkdirat", "renameat", "linkat"}, s.Call) {
			// Before it, and before what comes next.
			chosen[i+1], chosen[i+2] = true, true
		}
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	for range sampled {
		chosen[1+rng.IntN(first)] = true
		chosen[first+rng.IntN(last-first)] = true
		chosen[last+1+rng.IntN(len(steps)-last)] = true
	}
	t.Logf("of %d steps, of which %d to %d are the load, %d are tried, by seed %d (%s; all: %s=1)",
		len(steps), first, last, len(chosen), seed, seedEnv, allSteps)
	return func(step int) bool { return chosen[step] || step > len(steps) }
}

// booted gives a node on which no ADD has been, and the steps of its first.
func booted(t *testing.T, w *testbed.World, observe []string) testbed.StepsResult {
	t.Helper()
	n := newNode(t, w)
	p := n.pod(t)
	r, s := n.Steps(t, "ADD", p, testbed.Fault{}, observe)
	if !r.OK() {
		t.Fatalf("ADD: %s", r)
	}
	n.MustDel(t, p)
	n.expectNothing(t, p)
	return s
}

// TestPrivilegedKilledAnywhere kills the plugin at each of its steps.
func TestPrivilegedKilledAnywhere(t *testing.T) {
	testbed.NeedSteps(t)
	w := begin(t)
	n := newNode(t, w)
	first := n.pod(t)
	n.MustAdd(t, first)
	n.MustDel(t, first)

	// expect what a pod has by the datapath of the test.
	expect := func(t *testing.T, n *node, p *testbed.Pod) {
		t.Helper()
		n.MustCheck(t, p)
		if n.Config["datapath"] != "iptables" {
			expectHooks(t, p)
		} else if !ruled(t, p) {
			t.Errorf("pod %s has no rules", p.Name)
		}
	}
	// killedAdd is one ADD that is killed, and what must be possible then: the
	// same again, or its end and another pod.
	killedAdd := func(t *testing.T, n *node, m *matrix, fault testbed.Fault) testbed.StepsResult {
		p := n.pod(t)
		r, s := n.Steps(t, "ADD", p, fault, nil)
		switch {
		case !s.Hit:
			if !r.OK() {
				t.Fatalf("ADD without a fault: %s", r)
			}
			n.MustDel(t, p)
		case r.ExitCode != -1:
			t.Fatalf("ADD was not killed: %s", r)
		case fault.Kind == testbed.KillBefore:
			n.MustAdd(t, p)
			expect(t, n, p)
			n.expectRedirected(t, p)
			n.MustDel(t, p)
			m.at(n, s, fault, outAddAgain)
		default:
			n.MustDel(t, p)
			n.expectOnly(t, cutShort, p)
			other := n.pod(t)
			n.MustAdd(t, other)
			expect(t, n, other)
			n.MustDel(t, other)
			n.expectNothing(t, other)
			m.at(n, s, fault, outDelAgain)
		}
		n.expectNothing(t, p)
		n.expectUnruled(t, p)
		return s
	}
	// killedDel is one DEL that is killed.
	killedDel := func(t *testing.T, n *node, m *matrix, step int) testbed.StepsResult {
		p := n.pod(t)
		n.MustAdd(t, p)
		fault := testbed.Fault{Step: step}
		r, s := n.Steps(t, "DEL", p, fault, nil)
		if s.Hit && r.ExitCode != -1 {
			t.Fatalf("DEL was not killed: %s", r)
		}
		if s.Hit && step%2 == 0 {
			n.MustAdd(t, p)
			expect(t, n, p)
		}
		n.MustDel(t, p, testbed.LateDel())
		n.expectNothing(t, p)
		n.expectUnruled(t, p)
		m.at(n, s, fault, outDelAgain)
		return s
	}

	add := newMatrix("ADD, killed", columnBefore, columnAfter)
	for _, kind := range []testbed.FaultKind{testbed.KillBefore, testbed.KillAfter} {
		name := map[testbed.FaultKind]string{testbed.KillBefore: "before", testbed.KillAfter: "after"}[kind]
		t.Run("ADD "+name, func(t *testing.T) {
			tried, _ := sweep(t, nil, func(t *testing.T, step int) testbed.StepsResult {
				if kind == testbed.KillAfter {
					n.drain(t)
				}
				return killedAdd(t, n, add, testbed.Fault{Step: step, Kind: kind})
			})
			t.Logf("killed %s each of %d steps", name, tried)
		})
	}
	add.settle(t)
	t.Run("DEL", func(t *testing.T) {
		m := newMatrix("DEL, killed", columnBefore)
		tried, _ := sweep(t, nil, func(t *testing.T, step int) testbed.StepsResult { return killedDel(t, n, m, step) })
		t.Logf("killed before each of %d steps", tried)
		m.settle(t)
	})
	t.Run("iptables", func(t *testing.T) {
		n := newNode(t, w)
		n.Config = map[string]any{"datapath": "iptables"}
		first := n.pod(t) // which finds the node's programs
		n.MustAdd(t, first)
		n.MustDel(t, first)
		m := newMatrix("ADD by iptables, killed", columnBefore, columnAfter)
		for _, kind := range []testbed.FaultKind{testbed.KillBefore, testbed.KillAfter} {
			sweep(t, oneIn(t, 10), func(t *testing.T, step int) testbed.StepsResult {
				return killedAdd(t, n, m, testbed.Fault{Step: step, Kind: kind})
			})
		}
		m.settle(t)
		m = newMatrix("DEL by iptables, killed", columnBefore)
		sweep(t, oneIn(t, 10), func(t *testing.T, step int) testbed.StepsResult { return killedDel(t, n, m, step) })
		m.settle(t)
	})
	t.Run("TPROXY and DNS", func(t *testing.T) {
		for _, verb := range []string{"ADD", "DEL"} {
			m := newMatrix(verb+" with TPROXY and DNS, killed", columnBefore)
			tried, _ := sweep(t, nil, func(t *testing.T, step int) testbed.StepsResult {
				p := n.heavyPod(t)
				if verb == "DEL" {
					n.MustAdd(t, p)
				}
				fault := testbed.Fault{Step: step}
				r, s := n.Steps(t, verb, p, fault, nil)
				if s.Hit && r.ExitCode != -1 || !s.Hit && !r.OK() {
					t.Fatalf("%s: %s", verb, r)
				}
				if s.Hit && step%2 == 1 || verb == "ADD" && !s.Hit {
					n.MustAdd(t, p)
					n.MustCheck(t, p)
					expectHooks(t, p, dnsHooks...)
					expectMarks(t, p, true)
				}
				n.MustDel(t, p)
				expectMarks(t, p, false)
				n.expectOnly(t, cutShort, p)
				m.at(n, s, fault, outDelAgain)
				return s
			})
			t.Logf("%s killed before each of %d steps", verb, tried)
			m.settle(t)
		}
		p := n.pod(t) // which clears away what was cut short
		n.MustAdd(t, p)
		n.MustDel(t, p)
	})
	t.Run("first ADD", func(t *testing.T) {
		all := booted(t, w, nil)
		m := newMatrix("first ADD, killed", columnBefore, columnAfter)
		tried, _ := sweep(t, sample(t, all), func(t *testing.T, step int) testbed.StepsResult {
			return killedAdd(t, newNode(t, w), m, testbed.Fault{Step: step, Kind: testbed.FaultKind(step % 2)})
		})
		t.Logf("killed at %d steps", tried)
		m.settle(t)
	})
}

// observed are the system calls that change nothing, but whose failure the
// plugin must get over or report.
var observed = []string{
	"openat", "read", "newfstatat", "fstat", "statfs", "fstatfs", "getdents64", "socket", "connect", "getsockopt", "setsockopt", "recvfrom",
}

// unlinked says that libc could not be linked to the plugin with the race
// detector: the failing step was not the plugin's.
func unlinked(r testbed.CNIResult) bool { return raced() && r.ExitCode == 127 }

// TestPrivilegedFailedAnywhere lets each system call fail in turn, once. An ADD
// must fail and leave nothing, or succeed with the pod redirected; a DEL must
// fail, or leave nothing.
func TestPrivilegedFailedAnywhere(t *testing.T) {
	testbed.NeedSteps(t)
	w := begin(t)
	errnos := []unix.Errno{unix.EIO, unix.ENOSPC, unix.EPERM}
	facts := "5s" // enough for another try
	if full() {
		facts = "2s" // which many steps cost
	}
	// each has a step fail by one of the errors, or, where all is tried, by each.
	each := func(step int, try func(fault testbed.Fault) testbed.StepsResult) (s testbed.StepsResult) {
		for i := range errnos {
			if i == 0 || full() {
				s = try(testbed.Fault{Step: step, Kind: testbed.FailCall, Errno: errnos[(step+i)%len(errnos)]})
			}
		}
		return s
	}
	var mu sync.Mutex
	outcomes := map[string]int{}
	count := func(what string, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		outcomes[fmt.Sprintf("%s succeeded: %v", what, ok)]++
	}

	failedAdd := func(t *testing.T, n *node, m *matrix, fault testbed.Fault) testbed.StepsResult {
		p := n.pod(t)
		r, s := n.Steps(t, "ADD", p, fault, observed)
		at := "no fault"
		if s.Hit {
			at = fmt.Sprintf("%v, %v", fault, s.Steps[fault.Step-1])
			count("ADD", r.OK())
		}
		switch {
		case r.OK():
			if string(r.Stdout) != prevResult(t, p, "1.1.0") {
				t.Errorf("%s: ADD printed %s", at, r.Stdout)
			}
			if c := n.Check(t, p); !c.OK() {
				t.Errorf("%s: ADD succeeded, but CHECK says %s", at, c)
			}
			outcome := outRedirected
			if n.Config["datapath"] != "ebpf" && ruled(t, p) {
				if n.Config["datapath"] == nil {
					outcome = outFallback
				}
				count("iptables", true)
			} else {
				expectHooks(t, p)
			}
			m.at(n, s, fault, outcome)
			if fault.Step%8 == 0 {
				n.expectRedirected(t, p)
			}
		case unlinked(r):
			n.expectNothing(t, p)
		case r.ExitCode != 1 || r.Err == nil || r.Err.Msg == "":
			t.Errorf("%s: ADD failed, but not by one CNI error: %s", at, r)
		default:
			if !strings.Contains(message(r), fault.Errno.Error()) && r.Code() != 11 {
				t.Logf("%s: the error doesn't say so: %s", at, message(r))
			}
			n.expectOnly(t, cutShort, p)
			n.expectUnruled(t, p)
			m.at(n, s, fault, outRefused)
		}
		n.MustDel(t, p)
		n.expectOnly(t, cutShort, p)
		n.MustAdd(t, p)
		n.MustCheck(t, p)
		n.MustDel(t, p)
		n.expectNothing(t, p)
		return s
	}

	n := newNode(t, w)
	n.Config = map[string]any{"podFactsTimeout": facts, "datapath": "ebpf"}
	first := n.pod(t)
	n.MustAdd(t, first)
	n.MustDel(t, first)
	failedDel := func(t *testing.T, n *node, m *matrix, fault testbed.Fault) testbed.StepsResult {
		p := n.pod(t)
		n.MustAdd(t, p)
		r, s := n.Steps(t, "DEL", p, fault, observed)
		if s.Hit {
			count("DEL", r.OK())
		}
		switch {
		case r.OK():
			n.expectNothing(t, p)
			n.expectUnruled(t, p)
			m.at(n, s, fault, outCleared)
		case unlinked(r):
		case r.ExitCode != 1 || r.Err == nil || r.Err.Msg == "":
			t.Errorf("%v: DEL failed, but not by one CNI error: %s", fault, r)
		default:
			m.at(n, s, fault, outLater)
		}
		n.MustDel(t, p, testbed.LateDel())
		n.expectNothing(t, p)
		n.expectUnruled(t, p)
		return s
	}

	add := newMatrix("ADD, a call fails", columnFails)
	for _, drained := range []bool{false, true} {
		t.Run(map[bool]string{false: "ADD", true: "ADD without a free stamp"}[drained], func(t *testing.T) {
			tried, _ := sweep(t, nil, func(t *testing.T, step int) testbed.StepsResult {
				return each(step, func(fault testbed.Fault) testbed.StepsResult {
					if drained {
						n.drain(t)
					}
					return failedAdd(t, n, add, fault)
				})
			})
			t.Logf("%d steps", tried)
		})
	}
	add.settle(t)
	t.Run("ADD, iptables may take over", func(t *testing.T) {
		auto := newNode(t, w)
		auto.Config = map[string]any{"podFactsTimeout": facts}
		first := auto.pod(t)
		auto.MustAdd(t, first)
		auto.MustDel(t, first)
		m := newMatrix("ADD where iptables may take over, a call fails", columnFails)
		tried, _ := sweep(t, nil, func(t *testing.T, step int) testbed.StepsResult {
			return each(step, func(fault testbed.Fault) testbed.StepsResult { return failedAdd(t, auto, m, fault) })
		})
		t.Logf("%d steps", tried)
		m.settle(t)
	})
	t.Run("DEL", func(t *testing.T) {
		m := newMatrix("DEL, a call fails", columnFails)
		tried, _ := sweep(t, nil, func(t *testing.T, step int) testbed.StepsResult {
			return each(step, func(fault testbed.Fault) testbed.StepsResult { return failedDel(t, n, m, fault) })
		})
		t.Logf("%d steps", tried)
		m.settle(t)
	})
	t.Run("iptables", func(t *testing.T) {
		n := newNode(t, w)
		n.Config = map[string]any{"podFactsTimeout": facts, "datapath": "iptables"}
		first := n.pod(t)
		n.MustAdd(t, first)
		n.MustDel(t, first)
		m := newMatrix("ADD by iptables, a call fails", columnFails)
		sweep(t, oneIn(t, 10), func(t *testing.T, step int) testbed.StepsResult {
			return each(step, func(fault testbed.Fault) testbed.StepsResult { return failedAdd(t, n, m, fault) })
		})
		m.settle(t)
		m = newMatrix("DEL by iptables, a call fails", columnFails)
		sweep(t, oneIn(t, 10), func(t *testing.T, step int) testbed.StepsResult {
			return each(step, func(fault testbed.Fault) testbed.StepsResult { return failedDel(t, n, m, fault) })
		})
		m.settle(t)
	})
	t.Run("first ADD", func(t *testing.T) {
		all := booted(t, w, observed)
		m := newMatrix("first ADD, a call fails", columnFails)
		tried, _ := sweep(t, sample(t, all), func(t *testing.T, step int) testbed.StepsResult {
			// One error is enough: there are hundreds of steps.
			return failedAdd(t, newNode(t, w), m, testbed.Fault{Step: step, Kind: testbed.FailCall, Errno: errnos[step%len(errnos)]})
		})
		t.Logf("%d steps", tried)
		m.settle(t)
	})
	t.Logf("outcomes: %v", outcomes)
}

// TestPrivilegedStorm starts many pods at once on a node that has just booted.
func TestPrivilegedStorm(t *testing.T) {
	const pods, atOnce = 50, 16
	n := newNode(t, begin(t))
	var all []*testbed.Pod
	for range pods {
		all = append(all, n.pod(t))
	}
	storm := func(command string, limit int, check func(p *testbed.Pod, r testbed.CNIResult) error) {
		t.Helper()
		errs := make([]error, pods)
		slots := make(chan struct{}, limit)
		var wg sync.WaitGroup
		start := time.Now()
		for i, p := range all {
			wg.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				r, err := n.Exec(command, p)
				if err == nil {
					err = check(p, r)
				}
				if err != nil {
					errs[i] = fmt.Errorf("%s of pod %s: %w", command, p.Name, err)
				}
			})
		}
		wg.Wait()
		t.Logf("%d × %s, %d at once: %v", pods, command, limit, time.Since(start).Round(time.Millisecond))
		if err := errors.Join(errs...); err != nil {
			t.Error(err)
		}
	}
	succeeds := func(_ *testbed.Pod, r testbed.CNIResult) error {
		if !r.OK() {
			return fmt.Errorf("%s", r)
		}
		return nil
	}
	want := map[*testbed.Pod]string{}
	for _, p := range all {
		want[p] = prevResult(t, p, "1.1.0")
	}
	storm("ADD", atOnce, func(p *testbed.Pod, r testbed.CNIResult) error {
		if !r.OK() || string(r.Stdout) != want[p] {
			return fmt.Errorf("%s", r)
		}
		return nil
	})
	if loaded := glob(t, n.BPFDir+"/*-*"); len(loaded) != 1 {
		t.Errorf("datapaths: %q", loaded)
	}
	storm("CHECK", atOnce, succeeds)
	for i, p := range all {
		expectHooks(t, p)
		if i%10 == 0 {
			n.expectRedirected(t, p)
		}
	}
	if slots := n.stamped(t); len(slots) != pods {
		t.Errorf("%d stamps are in use by %d pods: %v", len(slots), pods, slots)
	}
	storm("DEL", pods, succeeds)
	n.expectNothing(t, all...)
	if free := glob(t, n.BPFDir+"/datapath-*/free/*"); len(free) != pods {
		t.Errorf("%d stamps are free after %d pods", len(free), pods)
	}
}

// TestPrivilegedSandboxRecreated: the sandbox of a pod dies, and the kubelet
// makes another on the same cgroup, whenever the old one's DEL comes.
func TestPrivilegedSandboxRecreated(t *testing.T) {
	w := begin(t)
	for _, c := range []struct {
		name string
		// dels are how often the predecessor's DEL comes: before the new
		// sandbox's ADD, after it, and after its DEL.
		before, after, end int
	}{
		{name: "DEL in time", before: 1},
		{name: "DEL late", after: 1},
		{name: "DEL twice late", after: 2},
		{name: "DEL before and after", before: 1, after: 1},
		{name: "DEL missing until all is over", end: 1},
		{name: "DEL after the new one's, twice", end: 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, w)
			old := n.pod(t)
			n.MustAdd(t, old)
			n.expectRedirected(t, old)
			del := func(times int) {
				t.Helper()
				for range times {
					n.MustDel(t, old, testbed.LateDel())
				}
			}
			old.Destroy(t)
			del(c.before)
			p := testbed.NewPod(t, testbed.InWorld(w), testbed.SandboxOf(old))
			for range 2 { // the runtime may repeat it
				n.MustAdd(t, p)
				expectHooks(t, p)
				n.MustCheck(t, p)
			}
			n.expectRedirected(t, p)
			del(c.after)
			expectHooks(t, p)
			n.MustCheck(t, p)
			n.expectRedirected(t, p)

			// A third, while the second is still there.
			third := testbed.NewPod(t, testbed.SandboxOf(old), testbed.InWorld(testbed.NewWorld(t)))
			n.MustAdd(t, third)
			for _, x := range []*testbed.Pod{p, third} {
				expectHooks(t, x)
				n.MustCheck(t, x)
			}
			n.MustDel(t, p)
			expectHooks(t, third)
			n.MustCheck(t, third)
			if h := hooksOf(t, p)[ebpf.AttachSkLookup.String()]; h != 0 {
				t.Errorf("%d programs are left in the second sandbox", h)
			}
			n.MustDel(t, third)
			del(c.end)
			n.expectNothing(t, old, p, third)
		})
	}
}
