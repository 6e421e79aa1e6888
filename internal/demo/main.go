// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Command demo shows what Shunt does, on a pod of its own: a network namespace
// and a cgroup such as a container runtime makes them, an app and a toy proxy
// in it, and a world around it. It runs the real plugin by the CNI protocol
// and lets the sockets tell what became of their connections.
//
// It is a check too: it fails when anything is not as it should be. Nothing of
// the host's is touched, and nothing is left behind. It has to run as root.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"shunt.dev/shunt/internal/testbed"
)

// paths are the ways to redirect, by the name that the option -path takes.
var paths = []string{"ebpf", "iptables"}

func main() {
	plugin := flag.String("plugin", "bin/shunt-cni", "the plugin's `binary`")
	path := flag.String("path", "all", "how to redirect: all, "+strings.Join(paths, ", "))
	rounds := flag.Int("rounds", 20, "`number` of ADDs to take the time of")
	flag.Parse()
	chosen := []string{*path}
	if *path == "all" {
		chosen = paths
	}
	if err := checkUsage(chosen, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(2)
	}

	// Ctrl-C reaches the processes in the pod as well: whatever step is under
	// way comes to an end, and the next one doesn't begin.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	for _, p := range chosen {
		d := &demo{stage: &stage{ctx: ctx}, path: p, plugin: *plugin, rounds: *rounds}
		if ok := d.run(d.play); !ok || d.wrong > 0 {
			if ctx.Err() != nil {
				fmt.Fprintln(os.Stderr, "demo: stopped")
				os.Exit(130)
			}
			fmt.Fprintf(os.Stderr, "demo: failed (%d not as expected)\n", d.wrong)
			os.Exit(1)
		}
	}
	fmt.Println("\nEverything was as it should be, and nothing is left behind.")
}

func checkUsage(chosen []string, rounds int) error {
	for _, p := range chosen {
		if !slices.Contains(paths, p) {
			return fmt.Errorf("there is no path %q: have %s", p, strings.Join(paths, ", "))
		}
	}
	if rounds < 1 {
		return errors.New("-rounds must be at least 1")
	}
	if os.Geteuid() != 0 {
		return errors.New("network namespaces, cgroups and eBPF need root: sudo make demo")
	}
	return nil
}

// A demo is one play on one path.
type demo struct {
	*stage
	path   string // of paths
	plugin string
	rounds int
	wrong  int // what was not as expected

	world *testbed.World
	pod   *testbed.Pod
	proxy *testbed.Proxy
	app   *testbed.App
	cni   *testbed.CNI
}

// Where the app connects to, and who connects to the app.
var (
	service4 = netip.MustParseAddrPort("10.99.0.1:80")
	service6 = netip.MustParseAddrPort("[fd99::1]:80")
	excluded = netip.MustParseAddrPort("192.0.2.10:80")
	client4  = netip.MustParseAddr("198.51.100.7")
	client6  = netip.MustParseAddr("fd99::7")
)

const (
	appPort      = 8080
	excludedCIDR = "192.0.2.0/24"
	toProxy      = "through the proxy"
	direct       = "direct"
)

func (d *demo) play() {
	testbed.NoLeaks(d)
	d.title("Shunt redirects a pod's TCP traffic to its sidecar proxy: " + d.path)
	d.build()

	d.step("before", "Before ADD, nothing is redirected")
	d.outbound(service4, "direct")

	d.step("ADD", "The container runtime calls the plugin")
	d.add()

	d.step("proxy", "The pod's containers start: here is its sidecar, a toy proxy")
	d.proxy = d.pod.StartProxy(d, testbed.ProxyUID, testbed.ProxyGID)
	d.say("proxy", "uid %d, listens on :%d (out) and :%d (in)", testbed.ProxyUID, testbed.OutboundPort, testbed.InboundPort)

	d.step("outbound", "The app connects to a service")
	d.outbound(service4, "out")
	if d.pod.Addr6().IsValid() {
		d.outbound(service6, "out")
	}
	d.step("inbound", "A client connects to the app")
	d.inbound(client4, d.pod.Addr4(), "in")
	if d.pod.Addr6().IsValid() {
		d.inbound(client6, d.pod.Addr6(), "in")
	}
	d.step("excluded", "The pod's annotation excludes "+excludedCIDR)
	d.outbound(excluded, "direct")

	d.step("proxy down", "Without its proxy the pod is refused, never let past it")
	d.proxyDown()

	d.step("DEL", "The runtime takes the pod's network down")
	d.del()
}

// build makes everything that is there before the plugin is called.
func (d *demo) build() {
	binary, err := filepath.Abs(d.plugin)
	if err != nil {
		d.Fatal(err)
	}
	if _, err := os.Stat(binary); err != nil {
		d.Fatalf("the plugin is not built: %v (make build)", err)
	}
	d.world = testbed.NewWorld(d)
	d.pod = testbed.NewPod(d, testbed.InWorld(d.world), testbed.Named("default", "demo"))
	d.app = d.pod.StartApp(d, appPort)
	d.world.Listen(d, testbed.ListenSpec{Name: "world", Addr: netip.MustParseAddrPort("[::]:80")})

	api := testbed.NewAPIServer(d)
	api.SetPod(d, d.pod.Namespace, d.pod.Name,
		d.pod.Injected(testbed.Annotate("traffic.sidecar.istio.io/excludeOutboundIPRanges", excludedCIDR)))
	runDir := d.TempDir()
	d.cni = &testbed.CNI{
		Plugin: binary, CNIVersion: "1.1.0", RunDir: runDir,
		BPFDir:     filepath.Join(testbed.BPFFS(d), "shunt"),
		Kubeconfig: api.WriteKubeconfig(d, runDir),
		Config:     map[string]any{"datapath": d.path},
	}
	d.say("pod", "%s/%s, its own network namespace and cgroup", d.pod.Namespace, d.pod.Name)
	for _, a := range d.pod.AllAddrs() {
		d.say("", "eth0 %s", a)
	}
	d.say("app", "uid %d, listens on :%d", testbed.AppUID, appPort)
	d.say("service", "outside of the pod, on %s and every address", service4)
}

// add shows what the runtime configures and gets, and the time that it takes.
func (d *demo) add() {
	// The first pod of a node pays for the programs' loading.
	first := d.cni.MustAdd(d, d.pod, d.showEntry)
	var took []time.Duration
	for range d.rounds {
		d.check()
		d.cni.MustDel(d, d.pod)
		took = append(took, d.cni.MustAdd(d, d.pod).Elapsed)
	}
	slices.Sort(took)
	prev, err := json.Marshal(d.pod.PrevResult(d.cni.CNIVersion))
	if err != nil {
		d.Fatal(err)
	}
	d.folded("stdout", string(bytes.TrimSpace(first.Stdout)))
	d.expect(bytes.Equal(bytes.TrimSpace(first.Stdout), prev), "", "the previous plugin's result, unchanged")
	firstOfNode := "which loads the programs"
	if d.path == "ebpf" {
		want := []string{"connect4", "connect6", "getpeername4", "getpeername6", "getsockopt", "sk_lookup", "sockops"}
		d.folded("hooks", strings.Join(want, " "))
		d.expect(d.hooksAre(want), "", "eBPF programs are attached to this pod alone")
	} else {
		firstOfNode = "which looks for iptables"
		d.expect(d.rules() > 0 && d.hooksAre(nil), "", "%d rules are in the pod's network namespace", d.rules())
	}
	d.say("time", "ADD as a process, from start to exit:")
	d.say("", "%s, median of %d (fastest %s)", ms(took[len(took)/2]), len(took), ms(took[0]))
	d.say("", "%s for the first of the node, %s", ms(first.Elapsed), firstOfNode)
}

// showEntry prints the plugin's entry in the runtime's conflist. What is
// taken out of it here, the runtime adds for each call.
func (d *demo) showEntry(i *testbed.Invocation) {
	entry := maps.Clone(i.Config)
	for _, key := range []string{"cniVersion", "name", "prevResult", "runtimeConfig"} {
		delete(entry, key)
	}
	text, err := json.Marshal(entry)
	if err != nil {
		d.Fatal(err)
	}
	d.folded("conflist", string(text))
}

// outbound lets the app connect, and compares what both ends say: the service
// itself is to have accepted ("direct"), or the proxy ("out").
func (d *demo) outbound(to netip.AddrPort, want string) {
	r := d.app.Connect(d, testbed.ConnectSpec{Dst: to})
	if want == "direct" {
		d.arrow(fmt.Sprintf("app -> %s", to), "the service itself", r, "world")
		return
	}
	d.arrow(fmt.Sprintf("app -> %s", to), fmt.Sprintf("proxy :%d", testbed.OutboundPort), r, want)
	d.original(r, to)
	d.expect(unmap(r.Peer) == to, "app", "getpeername   %s", unmap(r.Peer))
}

// inbound lets the world connect to the app.
func (d *demo) inbound(from, to netip.Addr, want string) {
	dst := netip.AddrPortFrom(to, appPort)
	r := d.world.Connect(d, testbed.ConnectSpec{Dst: dst, SocketSpec: testbed.SocketSpec{Bind: netip.AddrPortFrom(from, 0)}})
	d.arrow(fmt.Sprintf("%s -> %s", from, dst), fmt.Sprintf("proxy :%d", testbed.InboundPort), r, want)
	d.original(r, dst)
}

// original prints what the proxy's accepted socket says.
func (d *demo) original(r testbed.ConnectResult, dst netip.AddrPort) {
	if r.Served == nil {
		return
	}
	o := r.Served.OrigDst()
	d.expect(o.OK() && unmap(o.Addr) == dst, "proxy", "original destination  %s%s", o.Addr, o.Errno)
	d.expect(unmap(r.Served.Peer) == unmap(r.Local), "", "peer                  %s", unmap(r.Served.Peer))
}

// arrow prints which way a connection went.
func (d *demo) arrow(flow, where string, r testbed.ConnectResult, want string) {
	if r.Errno != "" {
		d.expect(false, "", "%s  =>  %s at %s", flow, r.Errno, r.Step)
		return
	}
	if r.Listener() != want {
		where = fmt.Sprintf("listener %q in place of %s", r.Listener(), where)
	}
	d.expect(r.Listener() == want, "", "%s  =>  %s", flow, where)
}

// proxyDown ends the proxy.
func (d *demo) proxyDown() {
	d.proxy.Kill(d)
	for _, f := range []struct {
		flow string
		r    testbed.ConnectResult
	}{
		{fmt.Sprintf("app -> %s", service4), d.app.Connect(d, testbed.ConnectSpec{Dst: service4})},
		{fmt.Sprintf("client -> %s:%d", d.pod.Addr4(), appPort), d.world.Connect(d, testbed.ConnectSpec{Dst: netip.AddrPortFrom(d.pod.Addr4(), appPort)})},
	} {
		d.expect(f.r.Errno == "ECONNREFUSED" && f.r.Step == testbed.StepConnect, "", "%s  =>  %s", f.flow, f.r.Errno+f.r.Listener())
	}
}

// del removes the redirection, and looks for what is left of it.
func (d *demo) del() {
	r := d.cni.MustDel(d, d.pod)
	d.expect(len(r.Stdout) == 0, "", "DEL took %s and printed nothing", ms(r.Elapsed))
	d.expect(d.hooksAre(nil) && d.rules() == 0, "", "no program is attached to the pod, and no rule is left")
	left := d.leftovers()
	d.expect(len(left) == 0, "", "pins and records of the pod that are left: %d %s", len(left), strings.Join(left, " "))
	d.outbound(service4, "direct")
	late := d.cni.Del(d, d.pod, testbed.LateDel())
	d.expect(late.OK(), "", "a late second DEL, without netns and prevResult, succeeds")
}

// rules counts our iptables rules in the pod, of both families.
func (d *demo) rules() int {
	n := 0
	for _, save := range []string{"iptables-save", "ip6tables-save"} {
		n += strings.Count(d.pod.Command(d, save), "-A SHUNT")
	}
	return n
}

// hooksAre says whether programs are attached at these hooks of the pod, and at
// no others. The kernel takes one away a moment after its last link is gone.
func (d *demo) hooksAre(want []string) bool {
	var have []string
	ok := testbed.Poll(5*time.Second, func() bool {
		have = d.hooks()
		return slices.Equal(have, want)
	})
	if !ok {
		d.say("", "attached: %s", strings.Join(have, " "))
	}
	return ok
}

// hooks names the places of the pod that eBPF programs are attached to.
func (d *demo) hooks() []string {
	var found []string
	look := func(file string, types map[string]ebpf.AttachType) {
		f, err := os.Open(file)
		if err != nil {
			d.Fatal(err)
		}
		defer f.Close()
		for name, at := range types {
			r, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: at})
			if err != nil {
				d.Fatalf("ask which programs are at %s of %s: %v", name, file, err)
			}
			if len(r.Programs) > 0 {
				found = append(found, name)
			}
		}
	}
	look(d.pod.CgroupPath(), map[string]ebpf.AttachType{
		"connect4": ebpf.AttachCGroupInet4Connect, "connect6": ebpf.AttachCGroupInet6Connect,
		"getpeername4": ebpf.AttachCgroupInet4GetPeername, "getpeername6": ebpf.AttachCgroupInet6GetPeername,
		"getsockopt": ebpf.AttachCGroupGetsockopt, "sockops": ebpf.AttachCGroupSockOps,
	})
	look(d.pod.NetnsPath(), map[string]ebpf.AttachType{"sk_lookup": ebpf.AttachSkLookup})
	slices.Sort(found)
	return found
}

// leftovers lists the files of attachments. What is the node's stays: the
// loaded datapath, the lock, the kubeconfig, which iptables was found, and the log
// that waits for an agent.
func (d *demo) leftovers() []string {
	var left []string
	for _, root := range []string{d.cni.BPFDir, d.cni.RunDir} {
		err := filepath.WalkDir(root, func(path string, e os.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil // iptables has no pins
			case err != nil:
				return err
			case e.IsDir() && strings.HasPrefix(e.Name(), "datapath-"):
				return filepath.SkipDir
			case e.IsDir() || path == d.cni.Kubeconfig || slices.Contains([]string{"lock", "iptables-backend", "log"}, e.Name()):
				return nil
			}
			left = append(left, path)
			return nil
		})
		if err != nil {
			d.Fatal(err)
		}
	}
	return left
}

// check ends the demo if the user wants that.
func (d *demo) check() {
	if d.ctx.Err() != nil {
		d.FailNow()
	}
}

// unmap gives an address as a person writes it.
func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

func ms(t time.Duration) string { return fmt.Sprintf("%.1f ms", float64(t.Microseconds())/1000) }
