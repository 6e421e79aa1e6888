// SPDX-License-Identifier: Apache-2.0

//go:build linux

package repair

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"shunt.dev/shunt/internal/fakekube"
	"shunt.dev/shunt/internal/testbed"
)

var builtShunt = sync.OnceValues(func() (string, error) {
	return testbed.BuildCommand("shunt.dev/shunt/cmd/shunt", os.Getenv(testbed.RaceEnv) != "")
})

// A bed is a node of which the plugin may not be there yet, with the cluster
// about it.
type bed struct {
	kube       *fakekube.Server
	cri        *fakeCRI
	world      *testbed.World
	cni        *testbed.CNI
	shunt      string // which every user may execute
	kubeconfig string
	dir        string
}

// makeBed is the first line of a privileged test.
func makeBed(t *testing.T) *bed {
	t.Helper()
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	b := &bed{kube: fakekube.Start(t), cri: startCRI(t), world: testbed.NewWorld(t), cni: testbed.NewCNI(t), dir: t.TempDir()}
	b.world.ServeAll(t)
	b.kubeconfig = b.kube.WriteKubeconfig(t, b.dir)
	b.cni.Kubeconfig, b.cni.RunDir = b.kubeconfig, filepath.Join(b.dir, "run")
	built, err := builtShunt()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(built)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{b.dir, filepath.Dir(b.dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.shunt = filepath.Join(b.dir, "shunt")
	if err := os.WriteFile(b.shunt, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return b
}

// conf writes the plugin's configuration, with keys.
func (b *bed) conf(t *testing.T, p *testbed.Pod, keys map[string]any) string {
	t.Helper()
	all := map[string]any{"type": "shunt-cni", "runDir": b.cni.RunDir, "bpfDir": b.cni.BPFDir, "cgroupRoot": p.CgroupRoot()}
	for k, v := range keys {
		all[k] = v
	}
	b.cni.Config = keys
	data, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, filepath.Join(b.dir, "netconf.json"), string(data))
}

// start has the kubelet start a pod: its sandbox is there, and its process.
func (b *bed) start(t *testing.T, opts ...testbed.Option) (*testbed.Pod, *testbed.Process) {
	t.Helper()
	p := testbed.NewPod(t, append([]testbed.Option{testbed.InWorld(b.world)}, opts...)...)
	pause := p.Start(t, testbed.ProcessSpec{Argv: []string{"sleep", "infinity"}, UID: 65535, GID: 65535, Container: p.ContainerID})
	b.cri.add(p.Namespace, p.Name, p.UID, p.ContainerID, containerdInfo(pause.PID, p.NetnsPath()), ready, time.Now().Add(-time.Hour))
	return p, pause
}

// know has the API server know a pod, changed by edits.
func (b *bed) know(t *testing.T, p *testbed.Pod, edits ...func(*corev1.Pod)) {
	t.Helper()
	pod := new(corev1.Pod)
	if err := json.Unmarshal(p.Injected(), pod); err != nil {
		t.Fatal(err)
	}
	pod.Spec.NodeName, pod.ResourceVersion = testNode, ""
	for _, a := range p.AllAddrs() {
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	for _, e := range edits {
		e(pod)
	}
	b.kube.Set(pod)
}

// validate runs the init container as the kubelet does, and has the API server
// know how it ended.
func (b *bed) validate(t *testing.T, p *testbed.Pod, want int) {
	t.Helper()
	for _, id := range [][2]int{{testbed.ProxyUID, testbed.ProxyGID}, {testbed.AppUID, testbed.AppGID}} {
		v := p.Start(t, testbed.ProcessSpec{
			Argv: []string{b.shunt, "validate", "--timeout=700ms"}, UID: id[0], GID: id[1], Container: "istio-validation",
			Env: []string{"GORACE=atexit_sleep_ms=0"},
		})
		if got := v.Wait(t); got != want {
			t.Errorf("shunt validate as %d: exit status %d, want %d\n%s", id[0], got, want, v.Output())
		}
	}
	fakekube.Update(b.kube, p.Namespace, p.Name, func(pod *corev1.Pod) {
		s := corev1.ContainerStatus{Name: "istio-validation", State: ended(int32(want))}
		if want != 0 {
			s.State, s.LastTerminationState = waiting, ended(int32(want))
		}
		pod.Status.InitContainerStatuses = []corev1.ContainerStatus{s}
	})
}

// wantRedirected fails the test unless connections of each family, by the app, by
// the world and by the proxy, go where they have to.
func wantRedirected(t *testing.T, p *testbed.Pod, app *testbed.App, proxy *testbed.Proxy) {
	t.Helper()
	expect := func(what, listener string, dst netip.AddrPort, r testbed.ConnectResult) {
		t.Helper()
		if r.Listener() != listener || r.Served.OrigDst().Addr != dst {
			t.Errorf("%s to %v: %+v (%+v), want %s with that destination", what, dst, r, r.Served, listener)
		}
	}
	for _, s := range []string{"10.99.3.4:80", "[fd99::3]:443"} {
		dst := netip.MustParseAddrPort(s)
		expect("the app", "out", dst, app.Connect(t, testbed.ConnectSpec{Dst: dst, Abort: true}))
		if r := proxy.Connect(t, testbed.ConnectSpec{Dst: dst, Abort: true}); r.Listener() != "world" {
			t.Errorf("the proxy to %v: %+v", dst, r)
		}
	}
	for _, a := range p.AllAddrs() {
		dst := netip.AddrPortFrom(a, 8080)
		expect("the world", "in", dst, p.World.Connect(t, testbed.ConnectSpec{Dst: dst, Abort: true}))
		expect("the proxy to itself", "in", dst, proxy.Connect(t, testbed.ConnectSpec{Dst: dst, Abort: true}))
	}
}

// left lists the records, links and rules of a pod.
func (b *bed) left(t *testing.T, p *testbed.Pod) (left []string) {
	t.Helper()
	for _, pattern := range []string{
		b.cni.RunDir + "/attachments/*", b.cni.RunDir + "/users/*", b.cni.RunDir + "/iptables/*.json", b.cni.BPFDir + "/netns/*", b.cni.BPFDir + "/cgroups/*",
	} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, paths...)
	}
	for _, save := range []string{"iptables-save", "ip6tables-save"} {
		if rules := p.Command(t, save); strings.Contains(rules, "SHUNT") {
			left = append(left, rules)
		}
	}
	return left
}

// backendsOf are the node's ways to redirect.
var backendsOf = map[string]map[string]any{
	"ebpf":            {"datapath": "ebpf"},
	"ebpf-tc":         {"datapath": "ebpf", "inboundHook": "tc"},
	"iptables-nft":    {"datapath": "iptables", "iptablesBackend": "nft"},
	"iptables-legacy": {"datapath": "iptables", "iptablesBackend": "legacy"},
}

// TestPrivilegedRace plays the race through: a pod was started before the plugin
// was there, its validation fails, the controller comes and mends it in place:
// the next validation passes, traffic is redirected, in the same sandbox, and the
// plugin's DEL ends what was done.
func TestPrivilegedRace(t *testing.T) {
	for name, keys := range backendsOf {
		for _, by := range []string{"runtime", "proc"} {
			if by == "proc" && name != "ebpf" && name != "iptables-nft" {
				continue // who finds the namespace has nothing to do with who programs it
			}
			t.Run(name+" by "+by, func(t *testing.T) {
				b := makeBed(t)
				p, pause := b.start(t)
				b.know(t, p)
				cookie := p.NetnsCookie(t)
				b.validate(t, p, exitMissing)

				socket := b.cri.socket
				if by == "proc" {
					socket = b.dir + "/nosuch.sock"
				}
				startCommand(t, b.kubeconfig, b.conf(t, p, keys), nil, "--cri-socket", socket)
				eventually(t, "its being mended", func() bool { return len(reasons(b.kube, p.Name)) > 0 })
				if got := reasons(b.kube, p.Name); len(got) != 1 || got[0] != "RedirectionRepaired" {
					t.Fatalf("events %q", got)
				}
				b.validate(t, p, 0)
				proxy, app := p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID), p.StartApp(t, 8080)
				wantRedirected(t, p, app, proxy)
				if !pause.Running() || p.NetnsCookie(t) != cookie {
					t.Error("the sandbox is another")
				}
				if used := calls(b.kube); used["delete pods"]+used["patch pods"]+used["create pods/eviction"] > 0 {
					t.Errorf("requests %v", used)
				}
				b.cni.MustCheck(t, p)
				b.cni.MustDel(t, p)
				if left := b.left(t, p); len(left) > 0 {
					t.Errorf("left behind by DEL: %q", left)
				}
			})
		}
	}
}

// TestPrivilegedRaceOtherwise: the same, where the pod is deleted: its successor,
// which the plugin sets up, passes; and where it is labelled, it is left as it is.
func TestPrivilegedRaceOtherwise(t *testing.T) {
	for mode, args := range map[string][]string{
		"delete": {"--repair-pods=false"}, "label": {"--repair-pods=false", "--delete-pods=false"},
	} {
		t.Run(mode, func(t *testing.T) {
			b := makeBed(t)
			p, _ := b.start(t)
			b.know(t, p)
			b.validate(t, p, exitMissing)
			startCommand(t, b.kubeconfig, b.conf(t, p, nil), nil, append(args, "--cri-socket", b.cri.socket)...)
			if mode == "label" {
				eventually(t, "the label", func() bool {
					pod, ok := fakekube.Get[*corev1.Pod](b.kube, p.Namespace, p.Name)
					return ok && pod.Labels["cni.istio.io/uninitialized"] == "true"
				})
				b.validate(t, p, exitMissing)
				return
			}
			eventually(t, "the pod's end", func() bool {
				_, ok := fakekube.Get[*corev1.Pod](b.kube, p.Namespace, p.Name)
				return !ok
			})
			next, _ := b.start(t)
			b.know(t, next)
			b.cni.PluginCgroupRoot = next.CgroupRoot()
			b.cni.MustAdd(t, next)
			b.validate(t, next, 0)
			wantRedirected(t, next, next.StartApp(t, 8080), next.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID))
			b.cni.MustDel(t, next)
			if used := calls(b.kube)["delete pods"]; used != 1 {
				t.Errorf("%d pods were deleted", used)
			}
		})
	}
}

// TestPrivilegedSweep: a pod that runs, with the proxy's listeners open, is found
// and mended: where nothing is programmed, where something of it was lost, and
// not where others redirect it, nor where its sandbox is younger than the grace.
func TestPrivilegedSweep(t *testing.T) {
	for _, name := range []string{"ebpf", "iptables-nft"} {
		t.Run(name, func(t *testing.T) {
			b := makeBed(t)
			runs := func(pod *corev1.Pod) {
				pod.Status.Phase = corev1.PodRunning
				pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", State: running}, {Name: "istio-proxy", State: running}}
			}
			p, _ := b.start(t)
			proxy, app := p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID), p.StartApp(t, 8080)
			foreign, _ := b.start(t)
			for _, line := range []string{"-N ISTIO_REDIRECT", "-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001"} {
				foreign.Command(t, append([]string{"iptables", "-t", "nat"}, strings.Fields(line)...)...)
			}
			b.know(t, p, runs)
			b.know(t, foreign, runs)
			conf := b.conf(t, p, backendsOf[name])
			c := startCommand(t, b.kubeconfig, conf, nil, "--cri-socket", b.cri.socket)
			want := func(n int) {
				t.Helper()
				eventually(t, "its being mended", func() bool {
					return strings.Count(strings.Join(reasons(b.kube, p.Name), " "), "RedirectionRepaired") == n
				})
				wantRedirected(t, p, app, proxy)
			}
			want(1)
			eventually(t, "word of the other's", func() bool { return len(reasons(b.kube, foreign.Name)) > 0 })
			if rules := foreign.Command(t, "iptables-save"); strings.Contains(rules, "SHUNT") || strings.Contains(c.out.String(), "mended in place\" pod="+foreign.Namespace+"/"+foreign.Name) {
				t.Errorf("a pod that others redirect was programmed:\n%s", rules)
			}

			// A part of it is lost, then all.
			if name == "ebpf" {
				links, err := filepath.Glob(b.cni.BPFDir + "/cgroups/*/*connect4")
				if err != nil || len(links) != 1 {
					t.Fatalf("links %q, %v", links, err)
				}
				if err := os.Remove(links[0]); err != nil {
					t.Fatal(err)
				}
			} else {
				p.Command(t, "iptables", "-t", "nat", "-F")
			}
			want(2)
			b.cni.MustDel(t, p)
			want(3)
			body, _ := c.get(t, "metrics-address", "/metrics")
			lost, wrong := 2, 1
			if strings.Contains(body, `shunt_repair_pods_total{result="ok",type="wrong"} 2`) {
				lost, wrong = 1, 2 // a sweep came while DEL was at work
			}
			for _, line := range []string{
				fmt.Sprintf(`shunt_repair_pods_total{result="ok",type="lost"} %d`, lost),
				fmt.Sprintf(`shunt_repair_pods_total{result="ok",type="wrong"} %d`, wrong),
				`shunt_repair_pods_total{result="skipped",type="lost"} 1`,
			} {
				if !strings.Contains(body, line) {
					t.Errorf("metrics lack %s:\n%s", line, body)
				}
			}
			// The sandbox ends, and its DEL is lost.
			fakekube.Remove[*corev1.Pod](b.kube, p.Namespace, p.Name)
			b.cri.remove(p.ContainerID) // the other's is there still
			eventually(t, "what was programmed to go", func() bool { return len(b.left(t, p)) == 0 })
		})
	}
}
