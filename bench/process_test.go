// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect/ebpf"
)

// unmeshed takes out of a pod what the mesh has injected.
func unmeshed(k *testbed.KubePod) {
	delete(k.Metadata.Annotations, "sidecar.istio.io/status")
	delete(k.Metadata.Labels, "security.istio.io/tlsMode")
	k.Spec.InitContainers, k.Spec.Containers = nil, k.Spec.Containers[:1]
}

// A yardstick is bench/reference, with what it needs to ask an API server.
type yardstick struct {
	binary, url, ca, token string
}

func newYardstick(b *testing.B, api *testbed.APIServer, kubeconfig string) *yardstick {
	b.Helper()
	binary, err := testbed.BuildCommand("shunt.dev/shunt/bench/reference", false)
	if err != nil {
		b.Fatal(err)
	}
	y := &yardstick{binary: binary, url: api.URL(), ca: filepath.Join(b.TempDir(), "ca.crt")}
	if err := os.WriteFile(y.ca, api.CA(), 0o600); err != nil {
		b.Fatal(err)
	}
	config, err := os.ReadFile(kubeconfig)
	if err != nil {
		b.Fatal(err)
	}
	y.token = string(regexp.MustCompile(`token: "(.*)"`).FindSubmatch(config)[1])
	return y
}

func (y *yardstick) run(b *testing.B, p *testbed.Pod) testbed.CNIResult {
	b.Helper()
	conf, err := json.Marshal(map[string]any{"prevResult": p.PrevResult("1.1.0")})
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.CommandContext(b.Context(), y.binary, fmt.Sprintf("%s/api/v1/namespaces/%s/pods/%s", y.url, p.Namespace, p.Name), y.ca, y.token)
	cmd.Stdin = bytes.NewReader(conf)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	start := time.Now()
	err = cmd.Run()
	took := time.Since(start)
	if err != nil {
		b.Fatalf("reference: %v: %s", err, out.Bytes())
	}
	return testbed.CNIResult{Elapsed: took, CPU: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
}

// asJSON rewrites a kubeconfig as the node agent writes it.
func asJSON(b *testing.B, kubeconfig string) {
	b.Helper()
	data, err := os.ReadFile(kubeconfig)
	if err == nil {
		data, err = yaml.YAMLToJSON(data)
	}
	if err == nil {
		err = os.WriteFile(kubeconfig, data, 0o600)
	}
	if err != nil {
		b.Fatal(err)
	}
}

func processName(op, path, facts string) string {
	return fmt.Sprintf("Process/op=%s/path=%s/facts=%s", op, path, facts)
}

// BenchmarkAddProcess compares, turn by turn, the plugin as a process, from exec to
// exit: by each way, with the facts of the node agent and of the API server; for a
// pod outside of the mesh (not-in-mesh) and one in a namespace that is excluded,
// of which no facts are asked (excluded); with the null plugin; and with the
// reference, a static binary that does one GET of the same pod from the same API
// server and prints prevResult. Every turn has fresh namespaces and another order.
func BenchmarkAddProcess(b *testing.B) {
	testbed.Privileged(b)
	n := newNode(b)
	api := testbed.NewAPIServer(b)
	kubeconfig := api.WriteKubeconfig(b, b.TempDir())
	reference := newYardstick(b, api, kubeconfig)
	asJSON(b, kubeconfig)
	agent := newAgent(b, filepath.Join(n.run, "agent"))
	n.join(b, agent)
	nothing, l := null(b), newLedger(b)

	facts := []string{"agent", "api"}
	measured := ways
	if testing.Short() {
		measured = []way{wayOf("ebpf-sk_lookup"), wayOf("iptables-nft")}
	}
	know := func(p *testbed.Pod, mutators ...testbed.PodMutator) {
		api.SetPod(b, p.Namespace, p.Name, p.Injected(mutators...))
		agent.set(b, p, mutators...)
	}
	plugins := map[string]*testbed.CNI{}
	for _, w := range measured {
		plugins[w.name] = n.cni(b, w)
		plugins[w.name].Kubeconfig = kubeconfig
	}
	crowd := n.crowd(b, len(measured)*len(facts))
	for _, p := range crowd.pods {
		know(p)
	}
	outside := testbed.NewPod(b, testbed.InWorld(n.world))
	know(outside, unmeshed)
	first := plugins[ways[0].name]
	children := map[string]int{}
	for _, w := range measured {
		children[w.name] = n.children(b, w, crowd)
	}

	turns := 0
	var took map[string]time.Duration // by the turn's ADDs
	done := func(name string, r testbed.CNIResult, more ...value) {
		took[name] = r.Elapsed
		l.add(name, r.Elapsed, append([]value{cpuPerOp(r.CPU)}, more...)...)
		if l.warm {
			l.kept[name+"/cpu"] = append(l.kept[name+"/cpu"], r.CPU)
		}
	}
	whole := func(w way, f string, p *testbed.Pod) {
		name := processName("add", w.name, f)
		cni := plugins[w.name]
		add := func() {
			done(name, cni.MustAdd(b, p), value{float64(children[w.name]), "children/op"})
		}
		if f == "api" {
			n.hide(b, w, add)
		} else {
			add()
		}
		// Of neither are facts asked: once a turn will do.
		if f == facts[0] {
			done(processName("check", w.name, "none"), cni.MustCheck(b, p))
			done(processName("del", w.name, "none"), cni.MustDel(b, p))
		} else {
			n.remove(b, w, p)
		}
	}
	var runs []func()
	for i, w := range measured {
		for j, f := range facts {
			runs = append(runs, func() { whole(w, f, crowd.pods[i*len(facts)+j]) })
		}
	}
	const versionName = "VERSION" // of no record but as a step
	runs = append(runs,
		func() { done(processName("add", "null", "none"), nothing.MustAdd(b, outside)) },
		func() { done(processName("add", "reference", "api"), reference.run(b, outside)) },
		func() { done(processName("add", "not-in-mesh", "agent"), first.MustAdd(b, outside)) },
		func() {
			done(processName("add", "excluded", "none"), first.MustAdd(b, outside, testbed.Set("excludeNamespaces", []string{outside.Namespace})))
		},
		func() {
			r := first.Run(b, "VERSION", nil)
			if !r.OK() {
				b.Fatal(r)
			}
			took[versionName] = r.Elapsed
		},
	)
	turn := func() {
		crowd.fresh(b, len(crowd.pods))
		took = map[string]time.Duration{}
		for i := range runs {
			runs[(turns+i)%len(runs)]()
		}
		// What an ADD does, by what each of these does more than the one before
		// it, in the same turn: any of them may come out as less than nothing.
		begun := time.Duration(0)
		for _, s := range []struct{ step, upTo string }{
			{"exec-and-runtime", versionName},
			{"parse", processName("add", "excluded", "none")},
			{"facts", processName("add", "not-in-mesh", "agent")},
			{"kernel", processName("add", ways[0].name, "agent")},
		} {
			l.add("ProcessStep/step="+s.step, took[s.upTo]-begun)
			begun = took[s.upTo]
		}
		turns++
	}
	turn()
	l.warm = true
	for b.Loop() {
		if every(50, turns-1) {
			progress("ADD as a process: turn %d", turns)
		}
		turn()
	}
	b.ReportMetric(0, "ns/op")
	byAgent, byAPI := processName("add", ways[0].name, "agent"), processName("add", ways[0].name, "api")
	floor := processName("add", "null", "none")
	l.ratio("ADD/reference", byAPI, 0.5, processName("add", "reference", "api"), 0.5)
	l.ratio("ADD-agent/ADD", byAgent, 0.5, byAPI, 0.5)
	l.ratio("ADD-agent-cpu/ADD-cpu", byAgent+"/cpu", 0.5, byAPI+"/cpu", 0.5)
	l.ratio("ADD-agent/null", byAgent, 0.5, floor, 0.5)
	l.ratio("not-in-mesh/null", processName("add", "not-in-mesh", "agent"), 0.5, floor, 0.5)
	l.ratio("excluded/null", processName("add", "excluded", "none"), 0.5, floor, 0.5)
	b.ReportMetric(float64(children[ways[0].name]), "ADD-children")
	l.micros("ADD-agent-cpu", byAgent+"/cpu")
	for _, name := range slices.Sorted(maps.Keys(l.kept)) {
		if short, ok := strings.CutPrefix(name, "Process/"); ok && !strings.HasSuffix(name, "/cpu") {
			l.micros(regexp.MustCompile(`\w+=`).ReplaceAllString(short, ""), name)
		} else if ok = strings.HasPrefix(name, "ProcessStep/"); ok {
			l.micros(strings.TrimPrefix(name, "ProcessStep/step="), name)
		}
	}
}

// The tracer is the test binary, started as the plugin: it has the real one,
// asTracer's value, trace its whole life, and writes how many processes that and
// its children have started into the file of traceFile.
const (
	asTracer  = "SHUNT_BENCH_AS_TRACER"
	traceFile = "SHUNT_BENCH_TRACE_FILE"
)

func runTracer() error {
	runtime.LockOSThread() // a tracer is a thread
	binary, file := os.Getenv(asTracer), os.Getenv(traceFile)
	attr := &os.ProcAttr{
		Env:   slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "SHUNT_BENCH_") }),
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Ptrace: true},
	}
	p, err := os.StartProcess(binary, []string{binary}, attr)
	if err != nil {
		return err
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(p.Pid, &status, 0, nil); err != nil || !status.Stopped() {
		return fmt.Errorf("%s does not stop at its start: %v, %w", binary, status, err)
	}
	const options = unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(p.Pid, options); err != nil {
		return err
	}
	processes, exit := 0, 0
	for pid, signal := p.Pid, 0; ; {
		if err := unix.PtraceCont(pid, signal); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		pid, err = unix.Wait4(-1, &status, unix.WALL, nil)
		if errors.Is(err, unix.ECHILD) {
			break
		}
		if err != nil {
			return err
		}
		signal = 0
		switch {
		case pid == p.Pid && status.Exited():
			exit = status.ExitStatus()
		case pid == p.Pid && status.Signaled():
			return fmt.Errorf("%s: %v", binary, status.Signal())
		case !status.Stopped():
		case status.TrapCause() == unix.PTRACE_EVENT_CLONE: // a thread, or not
			child, err := unix.PtraceGetEventMsg(pid)
			if err != nil {
				return err
			}
			if leader, err := isLeader(int(child)); err != nil {
				return err
			} else if leader {
				processes++
			}
		case status.TrapCause() == unix.PTRACE_EVENT_FORK, status.TrapCause() == unix.PTRACE_EVENT_VFORK:
			processes++
		case status.StopSignal() == unix.SIGSTOP, status.StopSignal() == unix.SIGTRAP: // its start, its exec
		default:
			signal = int(status.StopSignal())
		}
	}
	if err := os.WriteFile(file, []byte(strconv.Itoa(processes)), 0o600); err != nil {
		return err
	}
	os.Exit(exit)
	return nil
}

// isLeader tells a process from a further thread of one.
func isLeader(tid int) (bool, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	return strings.Contains(string(data), fmt.Sprintf("\nTgid:\t%d\n", tid)), err
}

// children counts how many processes an ADD starts that goes a way: one that
// comes after another, as on a node in use.
func (n *node) children(b *testing.B, w way, c *crowd) int {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	file := filepath.Join(b.TempDir(), "children")
	cni := n.cni(b, w)
	cni.MustAdd(b, c.pods[0])
	n.remove(b, w, c.pods[0])
	p := c.fresh(b, 1)[0]
	cni.Env = []string{asTracer + "=" + cni.Plugin, traceFile + "=" + file}
	cni.Plugin = self
	cni.MustAdd(b, p)
	n.remove(b, w, p)
	data, err := os.ReadFile(file)
	if err != nil {
		b.Fatal(err)
	}
	children, err := strconv.Atoi(string(data))
	if err != nil {
		b.Fatal(err)
	}
	return children
}

// BenchmarkCold measures the first ADD of a node, as a process with the agent's
// facts: with nothing loaded, as in a boot whose first pods come before the agent,
// and with the datapath loaded, as the agent does when it starts. No other pod has
// a hook, or any BPF object at all.
func BenchmarkCold(b *testing.B) {
	testbed.Privileged(b)
	bpffs, run := testbed.BPFFS(b), tmpfs(b)
	l := newLedger(b)
	agent := newAgent(b, filepath.Join(run, "agent"))
	n := &node{world: testbed.NewWorld(b), run: run}
	crowd := n.crowd(b, 1)
	agent.set(b, crowd.pods[0])
	name := func(loaded string) string { return "Cold/path=" + ways[0].name + "/loaded=" + loaded }
	rounds := 0
	add := func(loaded string) {
		p := crowd.fresh(b, 1)[0]
		rounds++
		n.run, n.bpfDir = filepath.Join(run, strconv.Itoa(rounds)), filepath.Join(bpffs, strconv.Itoa(rounds))
		dir := n.runDir(ways[0])
		if err := os.MkdirAll(dir, 0o700); err != nil {
			b.Fatal(err)
		}
		n.link(b, agent, dir)
		if loaded == "yes" {
			if err := ebpf.New(n.ebpf()).Ready(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		cni := n.cni(b, ways[0])
		r := cni.MustAdd(b, p)
		l.add(name(loaded), r.Elapsed, cpuPerOp(r.CPU))
		cni.MustDel(b, p)
		if err := os.RemoveAll(n.bpfDir); err != nil {
			b.Fatal(err)
		}
	}
	add("no")
	l.warm = true
	for turn := 0; b.Loop(); turn++ {
		if !every(10, turn) {
			continue
		}
		order := []string{"no", "yes"}
		if turn%20 != 0 {
			slices.Reverse(order)
		}
		for _, loaded := range order {
			add(loaded)
		}
	}
	b.ReportMetric(0, "ns/op")
	l.ratio("cold/loaded", name("no"), 0.5, name("yes"), 0.5)
	l.micros("cold", name("no"))
	l.micros("loaded", name("yes"))
}
