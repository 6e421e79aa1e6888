// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/fakekube"
	"shunt.dev/shunt/internal/testbed"
)

// These tests run shunt-node with the real plugin and the real datapath.

// A realBed is a bed with the built plugin, and pods.
type realBed struct {
	*bed
	world *testbed.World
	cni   *testbed.CNI
}

func newRealBed(t *testing.T) *realBed {
	t.Helper()
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	b := &realBed{bed: newBed(t), world: w}
	b.bpf = filepath.Join(testbed.BPFFS(t), "shunt")
	b.netconf(`"logLevel": "info"`)
	plugin := testbed.BuildPlugin(t)
	for _, name := range []string{"shunt-cni", "shunt"} {
		from, to := filepath.Join(filepath.Dir(plugin), name), filepath.Join(b.binaries, name)
		if err := os.Remove(to); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(from, to); err != nil {
			data, err := os.ReadFile(from)
			if err == nil {
				err = os.WriteFile(to, data, 0o755) //nolint:gosec // a program
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	b.cni = &testbed.CNI{Plugin: filepath.Join(b.bin, "shunt-cni"), CNIVersion: "1.1.0", RunDir: b.run, BPFDir: b.bpf, Env: []string{"GORACE=atexit_sleep_ms=0"}}
	return b
}

// pod makes a pod of the mesh that the API server knows.
func (b *realBed) pod(mutators ...testbed.PodMutator) *testbed.Pod {
	b.t.Helper()
	p := testbed.NewPod(b.t, testbed.InWorld(b.world))
	b.know(p, mutators...)
	return p
}

func (b *realBed) know(p *testbed.Pod, mutators ...testbed.PodMutator) {
	b.t.Helper()
	if err := b.kube.SetJSON(p.Injected(mutators...)); err != nil {
		b.t.Fatal(err)
	}
}

// use runs the plugin with the entry that is installed.
func (b *realBed) use() {
	b.t.Helper()
	b.cni.Config = b.entry()
	if b.cni.Config == nil {
		b.t.Fatal("there is no entry in the CNI configuration")
	}
}

// redirected counts the pod's hooks that have a program.
func redirected(t testing.TB, p *testbed.Pod) bool {
	t.Helper()
	count := func(path string, attach ebpf.AttachType) int {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		q, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: attach})
		if err != nil {
			t.Fatal(err)
		}
		return len(q.Programs)
	}
	return count(p.CgroupPath(), ebpf.AttachCGroupInet4Connect) == 1 && count(p.NetnsPath(), ebpf.AttachSkLookup) == 2
}

// metric gives a sample's value; -1 where there is none.
func (a *agentProcess) metric(sample string) float64 {
	a.b.t.Helper()
	_, body := a.get("metrics", "/metrics")
	for line := range strings.Lines(body) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), sample+" "); ok {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				a.b.t.Fatal(err)
			}
			return v
		}
	}
	return -1
}

// expectMetric waits for a sample's value, for the time of two sweeps.
func (a *agentProcess) expectMetric(sample string, want float64) {
	a.b.t.Helper()
	var got float64
	if !testbed.Poll(40*time.Second, func() bool { got = a.metric(sample); return got == want }) {
		a.b.t.Errorf("%s is %v, want %v", sample, got, want)
	}
}

// TestPrivilegedMetrics: what was done is what the metrics and the log say.
func TestPrivilegedMetrics(t *testing.T) {
	b := newRealBed(t)
	a := b.start()
	a.readyz(http.StatusOK, "[ok ] datapath: the eBPF datapath is loaded")
	b.use()
	one, two, other := b.pod(), b.pod(), b.pod(testbed.Annotate("shunt.dev/datapath", "iptables"))
	forced := b.pod(testbed.Annotate("traffic.sidecar.istio.io/excludeInterfaces", "net1"))
	bad := b.pod(testbed.Annotate("traffic.sidecar.istio.io/excludeInboundPorts", "x"))
	plain := b.pod(testbed.Unannotate("sidecar.istio.io/status"))
	for _, p := range []*testbed.Pod{one, two, other, forced, plain} {
		b.cni.MustAdd(t, p)
		t.Cleanup(func() { b.cni.MustDel(t, p) })
	}
	if r := b.cni.Add(t, bad); r.Code() != 7 {
		t.Errorf("ADD of a bad pod: %s", r)
	}
	app := one.Actor(t, "app", testbed.AppUID, testbed.AppGID)
	app.Listen(t, testbed.ListenSpec{Name: "out", Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), testbed.OutboundPort)})
	for range 3 {
		if r := app.Dial(t, "10.99.3.4:80"); r.Listener() != "out" {
			t.Errorf("%q at %q", r.Errno, r.Step)
		}
	}
	proxy := two.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
	proxy.Listen(t, testbed.ListenSpec{Name: "in", MPTCP: true, Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), testbed.InboundPort)})

	refused := fmt.Sprintf(`shunt_datapath_errors_total{error="listener-register %s",program="sockops"}`, unix.ErrnoName(unix.EOPNOTSUPP))
	a.expectMetric(`shunt_pods{backend="ebpf"}`, 2)
	a.expectMetric(`shunt_pods{backend="iptables"}`, 2)
	a.expectMetric(`shunt_flows_total{direction="outbound",rule="out-include-cidr"}`, 3)
	a.expectMetric(`shunt_pod_setup_seconds_count{backend="ebpf",result="ok"}`, 2)
	a.expectMetric(`shunt_pod_setup_seconds_count{backend="iptables",result="ok"}`, 2)
	a.expectMetric(`shunt_pod_setup_seconds_count{backend="none",result="failed"}`, 1)
	a.expectMetric(`shunt_fallback_total{reason="exclude-interfaces"}`, 1)
	a.expectMetric(refused, 1)
	a.expectLog("a pod has a problem", "pod="+two.Namespace+"/"+two.Name, "problem=listener-refused", "shunt.dev/inbound-hook: tc")
	a.expectLog("level=INFO", `msg="pod is redirected"`, "pod="+one.Namespace+"/"+one.Name, "from=shunt-cni")
	a.expectLog("level=INFO", `msg="pod is left alone"`, "pod="+plain.Namespace+"/"+plain.Name, "from=shunt-cni")
	if n := a.logged("a pod has a problem"); n != 1 {
		t.Errorf("%d problems in the log", n)
	}

	// Another agent goes on where this one ends; so do pods.
	a.end()
	if r := app.Dial(t, "10.99.3.4:80"); r.Listener() != "out" {
		t.Errorf("without an agent: %q at %q", r.Errno, r.Step)
	}
	a = b.start()
	a.ready()
	a.expectMetric(`shunt_flows_total{direction="outbound",rule="out-include-cidr"}`, 4)
	a.expectMetric(refused, 1)
	a.end()
}

// TestPrivilegedReload: a datapath that somebody has removed is loaded again.
func TestPrivilegedReload(t *testing.T) {
	b := newRealBed(t)
	a := b.start()
	a.readyz(http.StatusOK, "[ok ] datapath: the eBPF datapath is loaded")
	loaded := func() bool {
		found, err := filepath.Glob(filepath.Join(b.bpf, "datapath-*", "pods"))
		// TC's program, too, which a pod may ask for.
		tc, err2 := filepath.Glob(filepath.Join(b.bpf, "datapath-*", bpf.ShuntProgShuntTc))
		return err == nil && err2 == nil && len(found) == 1 && len(tc) == 1
	}
	if !loaded() {
		t.Error("it is not there")
	}
	if err := os.RemoveAll(b.bpf); err != nil {
		t.Fatal(err)
	}
	testbed.Eventually(t, "the datapath to be loaded again", loaded)
	a.end()
}

// capabilities are those that the agent's container has in the chart.
var capabilities = map[int]string{unix.CAP_BPF: "BPF", unix.CAP_NET_ADMIN: "NET_ADMIN", unix.CAP_PERFMON: "PERFMON"}

// TestPrivilegedCapabilities: the agent does all that it does with what its
// container has in the chart, and not with less.
func TestPrivilegedCapabilities(t *testing.T) {
	program, err := testbed.BuildCommand("shunt.dev/shunt/cmd/shunt-node", false)
	if err != nil {
		t.Fatal(err)
	}
	confined := func(t *testing.T, without int) *realBed {
		b := newRealBed(t)
		b.program = program
		b.wrap = func(cmd *exec.Cmd) {
			var caps []int
			for c := range capabilities {
				if c != without {
					caps = append(caps, c)
				}
			}
			container(cmd, caps, b.bin, b.conf, b.run, filepath.Dir(b.bpf))
		}
		return b
	}
	t.Run("all", func(t *testing.T) {
		b := confined(t, -1)
		a := b.start()
		a.readyz(http.StatusOK, "[ok ] datapath: the eBPF datapath is loaded")
		b.expectInstalled()
		b.use()
		p, other := b.pod(), b.pod(testbed.Annotate("shunt.dev/datapath", "iptables"))
		a.readyz(http.StatusOK, "2 pods")
		b.kube.Down() // so that only the agent can answer
		for _, p := range []*testbed.Pod{p, other} {
			b.cni.MustAdd(t, p)
			t.Cleanup(func() { b.del(p) })
		}
		if err := b.kube.Up(); err != nil {
			t.Fatal(err)
		}
		a.expectMetric(`shunt_pods{backend="ebpf"}`, 1)
		a.expectMetric(`shunt_pods{backend="iptables"}`, 1)
		a.expectMetric(`shunt_pod_setup_seconds_count{backend="ebpf",result="ok"}`, 1)
		a.expectLog("from=shunt-cni", `msg="pod is redirected"`)
		if n := a.logged("level=ERROR") + a.logged("can't be read") + a.logged("a pod has a problem"); n > 0 {
			t.Errorf("%d lines of trouble in the log", n)
		}
		fakekube.Remove[*appsv1.DaemonSet](b.kube, "shunt", "shunt-node")
		a.end()
		if b.entry() != nil {
			t.Error("the entry is there after the uninstall")
		}
		if !redirected(t, p) {
			t.Error("the pod has lost its redirection by the uninstall")
		}
	})
	for c, name := range capabilities {
		t.Run("without "+name, func(t *testing.T) {
			b := confined(t, c)
			a := b.start()
			a.readyz(http.StatusOK, "(no-permission)")
			a.end()
		})
	}
	t.Run("read-only", func(t *testing.T) {
		b := confined(t, -1)
		b.wrap = func(cmd *exec.Cmd) {
			container(cmd, []int{unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_PERFMON}, b.bin, b.run)
		}
		a := b.start()
		a.readyz(http.StatusServiceUnavailable, "[NOT] install: ")
		a.readyz(http.StatusServiceUnavailable, "read-only file system")
		a.end()
	})
}

// del runs DEL with the plugin as it was built: it may be gone from the node.
func (b *realBed) del(p *testbed.Pod) {
	b.t.Helper()
	cni := *b.cni
	cni.Plugin = testbed.BuildPlugin(b.t)
	cni.MustDel(b.t, p)
}

// TestPrivilegedOwnPod: the agent's own pod, and pods of excluded namespaces,
// start with no agent, no kubeconfig and no API server: or nothing would ever.
func TestPrivilegedOwnPod(t *testing.T) {
	b := newRealBed(t)
	a := b.start()
	a.ready()
	b.use()
	a.kill()
	b.kube.Down()
	for _, name := range []string{"kubeconfig", "agent.sock"} {
		if err := os.Remove(filepath.Join(b.run, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		namespace, name string
		ok              bool
	}{
		{"shunt", "shunt-node-x7k2p", true},
		{"kube-system", "coredns-abc", true},
		{"shunt", "shunt-node-debug", false},
		{"shop", "shunt-node-x7k2p", false},
	} {
		p := testbed.NewPod(t, testbed.InWorld(b.world), testbed.Named(tc.namespace, tc.name))
		if r := b.cni.Add(t, p, testbed.Set("podFactsTimeout", "2s")); r.OK() != tc.ok || !tc.ok && r.Code() != 11 {
			t.Errorf("%s/%s: %s", tc.namespace, tc.name, r)
		}
	}
}

// churn adds and deletes pods, from several goroutines, until stop is called.
// count tells how many there were. Each ADD has to succeed, and its pod to be
// redirected; where always is set, the runtime has to find the entry each time.
func (b *realBed) churn(n int, always bool) (count func() int, stop func()) {
	b.t.Helper()
	pods := make([]*testbed.Pod, n)
	for i := range pods {
		pods[i] = b.pod()
	}
	var wg sync.WaitGroup
	var done atomic.Int32
	over := make(chan struct{})
	for _, p := range pods {
		wg.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
				}
				if conf, err := os.ReadFile(filepath.Join(b.conf, confName)); always && (err != nil || !strings.Contains(string(conf), `"shunt-cni"`)) {
					b.t.Errorf("a pod starts while there is no entry: %v\n%s", err, conf)
				}
				if r, err := b.cni.Exec("ADD", p); err != nil || !r.OK() {
					b.t.Errorf("ADD: %v %s", err, r)
					return
				}
				if !redirected(b.t, p) {
					b.t.Errorf("pod %s goes around its proxy", p.Name)
				}
				if r, err := b.cni.Exec("DEL", p); err != nil || !r.OK() {
					b.t.Errorf("DEL: %v %s", err, r)
					return
				}
				done.Add(1)
			}
		})
	}
	return func() int { return int(done.Load()) }, func() {
		close(over)
		wg.Wait()
	}
}

// fewestPods have to come and go for churn to show anything: a machine that is
// busy is given more time.
const fewestPods = 10

// TestPrivilegedUpgrade: while agents take over from one another, every pod that
// starts is set up, and none goes around its proxy.
func TestPrivilegedUpgrade(t *testing.T) {
	b := newRealBed(t)
	old := b.start()
	old.ready()
	b.use()
	count, stop := b.churn(2, true)
	for i := 0; i < 10 || count() < fewestPods && !t.Failed(); i++ {
		fakekube.Update(b.kube, "shunt", "shunt-node", func(d *appsv1.DaemonSet) {
			d.Spec.Template.Spec.Containers = []corev1.Container{{Name: "agent", Image: fmt.Sprintf("shunt:%d", i)}}
		})
		var next *agentProcess
		if surge := i%2 == 0; surge {
			next = b.start()
			next.ready()
			old.end()
		} else {
			old.end()
			next = b.start()
			next.ready()
		}
		b.expectInstalled()
		old = next
	}
	stop()
	old.end()
	t.Logf("%d pods", count())
}

// TestPrivilegedKilled: an agent that is killed at any moment loses nothing: pods
// are set up meanwhile, the install heals, and each line of the plugin's log
// reaches an agent's.
func TestPrivilegedKilled(t *testing.T) {
	b := newRealBed(t)
	a := b.start()
	a.ready()
	b.use()
	count, stop := b.churn(2, false)
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // moments
	var logs strings.Builder
	for i := 0; i < 12 || count() < fewestPods && !t.Failed(); i++ {
		timer := time.NewTimer(time.Duration(rng.IntN(700)) * time.Millisecond)
		<-timer.C
		a.kill()
		logs.WriteString(a.out.String())
		if rng.IntN(3) == 0 {
			// Somebody uses the moment.
			b.write(filepath.Join(b.conf, confName), foreign)
		}
		a = b.start()
	}
	stop()
	a.ready()
	testbed.Eventually(t, "the entry", func() bool { return b.entry() != nil })
	b.expectInstalled()
	testbed.Eventually(t, "all to be read", func() bool {
		st, err := os.Stat(filepath.Join(b.run, "log"))
		return err == nil && st.Size() == 0
	})
	a.end()
	logs.WriteString(a.out.String())
	lines := strings.Count(logs.String(), `msg="pod is redirected"`)
	n := count()
	t.Logf("seed %d: %d pods, %d lines", seed, n, lines)
	if lines < n {
		t.Errorf("%d pods, and only %d lines of them in the log", n, lines)
	}
}

// TestPrivilegedInit: as the first process of its namespace the agent heeds both
// signals.
func TestPrivilegedInit(t *testing.T) {
	b := newRealBed(t)
	b.program = ""
	b.wrap = func(cmd *exec.Cmd) { container(cmd, nil, b.bin, b.conf, b.run) }
	a := b.start()
	a.ready()
	b.kube.Fail(fakekube.Fault{Resource: "daemonsets", Verb: "get", Hang: true})
	asked := len(b.kube.Requests())
	a.signal(syscall.SIGTERM)
	testbed.Eventually(t, "the question", func() bool { return len(b.kube.Requests()) > asked })
	a.signal(syscall.SIGTERM)
	if code := a.wait(); code != exitFailed {
		t.Errorf("it ended with %d", code)
	}
	b.expectInstalled()
}
