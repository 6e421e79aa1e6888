// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"shunt.dev/shunt/internal/found"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

var built = sync.OnceValues(func() (string, error) {
	return testbed.BuildCommand("shunt.dev/shunt/cmd/shunt", os.Getenv(testbed.RaceEnv) != "")
})

// node is a node that has just booted, and the command on it.
type node struct {
	shunt, dir     string
	runDir, bpfDir string
	cgroupRoot     string
}

// begin is the first line of a privileged test: it gives a node, and a pod of
// the mesh with its proxy and its app, in a world that answers wherever the app
// connects to.
func begin(t *testing.T) (*node, *testbed.Pod, *testbed.App) {
	t.Helper()
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	shunt, err := built()
	if err != nil {
		t.Fatal(err)
	}
	p := testbed.NewPod(t)
	p.World.ServeAll(t)
	n := &node{shunt: shunt, dir: t.TempDir(), bpfDir: testbed.BPFFS(t) + "/shunt", cgroupRoot: p.CgroupRoot()}
	n.runDir = filepath.Join(n.dir, "run")
	return n, p, p.StartApp(t, 8080)
}

func startProxy(t *testing.T, p *testbed.Pod) *testbed.Proxy {
	t.Helper()
	return p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID)
}

// file writes a file and gives its path.
func (n *node) file(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(n.dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// conf writes a configuration that asks for a datapath.
func (n *node) conf(t *testing.T, datapath string) string {
	t.Helper()
	data, err := json.Marshal(map[string]any{
		"type": "shunt-cni", "runDir": n.runDir, "bpfDir": n.bpfDir, "cgroupRoot": n.cgroupRoot, "datapath": datapath,
	})
	if err != nil {
		t.Fatal(err)
	}
	return n.file(t, datapath+".conf", data)
}

// run runs the built command.
func (n *node) run(t *testing.T, args ...string) (stdout, stderr string, exit int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), n.shunt, args...)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var bad *exec.ExitError
	if err != nil && !errors.As(err, &bad) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// want runs the command and fails the test unless it ends with the status exit,
// and has said text.
func (n *node) want(t *testing.T, exit int, text string, args ...string) (stdout string) {
	t.Helper()
	out, errs, got := n.run(t, args...)
	if got != exit || !strings.Contains(out+errs, text) {
		t.Errorf("shunt %s: exit status %d, want %d and %q\n%s%s", strings.Join(args, " "), got, exit, text, out, errs)
	}
	return out
}

// left lists the records and links on the node, and rules in the pod. The
// address ::6 is not looked for: eBPF leaves it on lo.
func (n *node) left(t *testing.T, p *testbed.Pod) (left []string) {
	t.Helper()
	for _, pattern := range []string{
		n.runDir + "/attachments/*", n.runDir + "/users/*", n.runDir + "/iptables/*.json",
		n.bpfDir + "/netns/*", n.bpfDir + "/cgroups/*",
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

// expectServed fails the test unless the app's connection is served by whom.
func expectServed(t *testing.T, app *testbed.App, dst, by string) {
	t.Helper()
	if r := app.Dial(t, dst); r.Listener() != by {
		t.Errorf("to %s: %+v, want it served by %s", dst, r, by)
	}
}

// TestPrivilegedApply: apply, check and remove, and what they do about a pod
// that was tampered with.
func TestPrivilegedApply(t *testing.T) {
	for _, datapath := range []string{"ebpf", "iptables"} {
		t.Run(datapath, func(t *testing.T) {
			n, p, app := begin(t)
			pod, conf := n.file(t, "pod.json", p.Injected()), n.conf(t, datapath)
			at := func(verb string, more ...string) []string {
				return append([]string{verb, "--netns", p.NetnsPath(), "--netconf", conf, "--pod", pod}, more...)
			}
			id := fmt.Sprintf("netns-%d@eth0", p.NetnsCookie(t))

			n.want(t, 6, "difference: the pod is to be redirected, but nothing is programmed\n", at("check")...)
			n.want(t, 0, "nothing is programmed\n", at("remove")...)
			for range 2 {
				n.want(t, 0, fmt.Sprintf("pod %s/%s is redirected by %s (configured: datapath %[3]s (netconf)), attachment %s\n", p.Namespace, p.Name, datapath, id), at("apply")...)
				n.want(t, 0, "as it should be\n", at("check")...)
			}
			startProxy(t, p)
			for _, dst := range []string{"10.99.3.4:80", "[fd99::3]:443"} {
				expectServed(t, app, dst, "out")
			}
			if r := p.World.Dial(t, p.Addr4().String()+":8080"); r.Listener() != "in" {
				t.Errorf("inbound: %+v", r)
			}

			// A file that can't be read changes nothing.
			bad := n.file(t, "bad.json", p.Injected(testbed.Annotate(keyExcludeOutboundPorts, "8o")))
			n.want(t, 2, "expected item 1", "apply", "--netns", p.NetnsPath(), "--netconf", conf, "--pod", bad)
			n.want(t, 0, "as it should be\n", at("check")...)

			// Nor does a verb do anything to another pod's attachment.
			other := n.file(t, "other.json", p.Injected(func(k *testbed.KubePod) { k.Metadata.Name = "another" }))
			for _, verb := range []string{"apply", "check", "remove"} {
				n.want(t, 2, "is of pod "+p.Namespace+"/"+p.Name, verb, "--netns", p.NetnsPath(), "--netconf", conf, "--pod", other)
			}
			n.want(t, 1, "leave --container-id and --ifname away", at("apply", "--container-id", "mine")...)

			// What somebody broke is found, and mended.
			if datapath == "iptables" {
				p.Command(t, "iptables", "-t", "nat", "-F")
			} else {
				links, err := filepath.Glob(n.bpfDir + "/cgroups/*/*")
				if err != nil || len(links) == 0 {
					t.Fatalf("links: %v, %v", links, err)
				}
				for _, l := range links {
					if err := os.Remove(l); err != nil {
						t.Fatal(err)
					}
				}
			}
			var c checked
			if err := json.Unmarshal([]byte(n.want(t, 6, "", at("check", "-o", "json")...)), &c); err != nil || c.AsItShouldBe || len(c.Differences) == 0 {
				t.Errorf("check -o json: %+v, %v", c, err)
			}
			n.want(t, 0, "redirected", at("apply")...)
			n.want(t, 0, "as it should be\n", at("check")...)
			expectServed(t, app, "10.99.3.4:80", "out")

			// The pod's file asks for something else.
			pod = n.file(t, "pod.json", p.Injected(testbed.Annotate(keyExcludeOutboundPorts, "3306")))
			n.want(t, 6, "than the pod asks for", at("check")...)
			n.want(t, 0, "redirected", at("apply")...)
			n.want(t, 0, "as it should be\n", at("check")...)
			expectServed(t, app, "10.99.3.4:3306", "world")
			expectServed(t, app, "10.99.3.4:80", "out")

			// And now to be left alone.
			pod = n.file(t, "pod.json", p.Injected(testbed.Unannotate("sidecar.istio.io/status")))
			n.want(t, 6, "the pod is to be left alone (P13:", at("check")...)
			n.want(t, 0, "is left alone (P13: ", at("apply")...)
			expectServed(t, app, "10.99.3.4:80", "out")

			n.want(t, 0, "removed: attachment "+id+", by "+datapath+"\n", at("remove")...)
			n.want(t, 0, "as it should be\n", at("check")...)
			n.want(t, 0, "; nothing is programmed\n", at("apply")...)
			n.want(t, 0, "nothing is programmed\n", at("remove")...)
			expectServed(t, app, "10.99.3.4:80", "world")
			if left := n.left(t, p); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
			n.want(t, 1, "never programmed", "apply", "--netns", "/proc/self/ns/net", "--netconf", conf, "--pod", other)
		})
	}
}

// TestPrivilegedStatus: what status says, in words and for machines, of a pod that
// is well, of one that is not, and of none.
func TestPrivilegedStatus(t *testing.T) {
	for _, datapath := range []string{"ebpf", "iptables"} {
		t.Run(datapath, func(t *testing.T) {
			n, p, app := begin(t)
			pod, conf := n.file(t, "pod.json", p.Injected()), n.conf(t, datapath)
			name := p.Namespace + "/" + p.Name
			status := func(exit int, text string, more ...string) string {
				t.Helper()
				return n.want(t, exit, text, append([]string{"status", "--netconf", conf}, more...)...)
			}
			decode := func(exit int, more ...string) (s nodeStatus) {
				t.Helper()
				d := json.NewDecoder(strings.NewReader(status(exit, "", append(more, "-o", "json")...)))
				d.DisallowUnknownFields()
				if err := d.Decode(&s); err != nil {
					t.Errorf("status -o json: %v", err)
				}
				return s
			}
			status(0, "no pod is redirected here\n")
			if s := decode(0); !s.AllWell || s.Pods == nil || len(s.Pods) != 0 {
				t.Errorf("no pod: %+v", s)
			}
			status(1, "pod "+name+" is not redirected here", "--pod", name)
			status(2, `--pod "reviews": expected NAMESPACE/NAME`, "--pod", "reviews")

			// Found by the repair controller, until it is redirected.
			lost := []redirect.PodRef{{Namespace: p.Namespace, Name: p.Name, UID: p.UID}}
			if err := errors.Join(os.MkdirAll(n.runDir, 0o700), found.Write(n.runDir, lost)); err != nil {
				t.Fatal(err)
			}
			status(6, name+"\nproblem  not-redirected: ")
			if s := decode(6, "--pod", name); s.AllWell || len(s.Pods) != 1 || s.Pods[0].Pod.UID != p.UID || s.Pods[0].Problems[0].Remedy == "" {
				t.Errorf("a pod that is not redirected: %+v", s)
			}

			n.want(t, 0, "is redirected", "apply", "--netns", p.NetnsPath(), "--netconf", conf, "--pod", pod)
			startProxy(t, p)
			for range 3 {
				expectServed(t, app, "10.99.3.4:80", "out")
			}
			status(0, name)
			status(0, "nothing is wrong\n")
			if err := found.Write(n.runDir, nil); err != nil { // by the next sweep
				t.Fatal(err)
			}
			status(0, "nothing is wrong\n", "--pod", name)
			status(1, "is not redirected here", "--pod", p.Namespace+"/another")
			s := decode(0, "--pod", name)
			if len(s.Pods) != 1 || !s.AllWell {
				t.Fatalf("%+v", s)
			}
			x := s.Pods[0]
			if x.name() != name || x.Pod.UID != p.UID || x.attachment() != fmt.Sprintf("netns-%d@eth0", p.NetnsCookie(t)) || x.Datapath != datapath ||
				x.Netns != p.NetnsPath() || x.Network != network || !x.Counted || len(x.Problems) != 0 || len(x.Hooks) == 0 || (len(x.Listeners) == 1) != (datapath == "ebpf") {
				t.Errorf("%+v", x)
			}
			if len(x.Flows) != 1 || x.Flows[0] != (flowCount{"outbound", "out-include-cidr", 3}) {
				t.Errorf("%+v", x.Flows)
			}

			// What somebody broke is told, and what is told mends it.
			want := "rules-differ"
			if datapath == "iptables" {
				p.Command(t, "iptables", "-t", "nat", "-F")
			} else {
				want = "hook-missing"
				links, err := filepath.Glob(n.bpfDir + "/cgroups/*/shunt_connect4")
				if err != nil || len(links) != 1 {
					t.Fatalf("links %v, %v", links, err)
				}
				if err := os.Remove(links[0]); err != nil {
					t.Fatal(err)
				}
			}
			status(6, "\nproblem  "+want+": ")
			status(6, "\nproblem  "+want+": ", "--pod", name)
			if s := decode(6); s.AllWell || len(s.Pods) != 1 || len(s.Pods[0].Problems) != 1 || s.Pods[0].Problems[0].Name != want {
				t.Errorf("%+v", s)
			}
			status(6, "\nremedy   run `shunt apply --netns "+p.NetnsPath()+" --pod FILE`")
			n.want(t, 0, "is redirected", "apply", "--netns", p.NetnsPath(), "--netconf", conf, "--pod", pod)
			status(0, "nothing is wrong\n")

			// A record that can't be read does not hide what can.
			dir := map[string]string{"ebpf": "attachments", "iptables": "iptables"}[datapath]
			bad := filepath.Join(n.runDir, dir, "x@eth0.json")
			if err := os.WriteFile(bad, []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
			if out := status(1, "it could not all be told: "); !strings.Contains(out, name) {
				t.Errorf("beside a record that can't be read:\n%s", out)
			}
			if err := os.Remove(bad); err != nil {
				t.Fatal(err)
			}
			n.want(t, 0, "removed", "remove", "--netns", p.NetnsPath(), "--netconf", conf)
			status(0, "no pod is redirected here\n")
			if left := n.left(t, p); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// TestPrivilegedSwitch: an app connects again and again while apply changes its
// policy and its datapath. Not one connection goes around the proxy.
func TestPrivilegedSwitch(t *testing.T) {
	n, p, app := begin(t)
	startProxy(t, p)
	apply := func(datapath string, excluded string) {
		t.Helper()
		pod := n.file(t, "pod.json", p.Injected(testbed.Annotate(keyExcludeOutboundPorts, excluded)))
		n.want(t, 0, "is redirected by "+datapath, "apply", "--netns", p.NetnsPath(), "--netconf", n.conf(t, datapath), "--pod", pod)
	}
	apply("ebpf", "")
	stop, done := make(chan struct{}), make(chan struct{})
	var mu sync.Mutex
	served := map[string]int{}
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return served["out"]
	}
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			dst := "10.99.3.4:80"
			if i%2 == 1 {
				dst = "[fd99::3]:443"
			}
			r := app.Connect(t, testbed.ConnectSpec{Dst: netip.MustParseAddrPort(dst), Timeout: time.Second})
			if r.Listener() != "out" {
				t.Logf("connection %d to %s: %+v", i, dst, r)
			}
			mu.Lock()
			served[r.Listener()+r.Errno]++
			mu.Unlock()
		}
	}()
	for _, step := range []struct{ datapath, excluded string }{
		{"ebpf", "3306"}, {"iptables", "3306"}, {"iptables", "5432"}, {"ebpf", "5432"}, {"iptables", ""}, {"ebpf", "1-79,444-60000"}, {"ebpf", ""},
	} {
		before := count()
		apply(step.datapath, step.excluded)
		testbed.Eventually(t, "more connections", func() bool { return count() > before+20 })
	}
	close(stop)
	<-done
	t.Logf("connections: %v", served)
	for by, number := range served {
		// Ends of connections of the time before may be left that never hear of
		// each other again (LAST_ACK); one that comes to have the same ports
		// fails. That is closed, too.
		if by != "out" && by != testbed.ErrnoTimeout {
			t.Errorf("%d of the connections ended with %q, want the proxy", number, by)
		}
	}
	n.want(t, 0, "removed", "remove", "--netns", p.NetnsPath(), "--netconf", n.conf(t, "auto"))
	if left := n.left(t, p); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestPrivilegedBesideCNI: apply works on the attachment that a runtime has
// made, which the runtime ends; and one of its own is no runtime's garbage.
func TestPrivilegedBesideCNI(t *testing.T) {
	n, p, app := begin(t)
	api, cni := testbed.NewAPIServer(t), testbed.NewCNI(t)
	cni.Kubeconfig = api.WriteKubeconfig(t, t.TempDir())
	cni.RunDir, cni.BPFDir = n.runDir, n.bpfDir
	api.SetPod(t, p.Namespace, p.Name, p.Injected())
	pod := n.file(t, "pod.json", p.Injected(testbed.Annotate(keyExcludeOutboundPorts, "3306")))

	cni.MustAdd(t, p)
	startProxy(t, p)
	own := p.ContainerID + "@eth0"
	for _, datapath := range []string{"ebpf", "iptables", "ebpf"} {
		n.want(t, 0, "is redirected by "+datapath, "apply", "--netns", p.NetnsPath(), "--netconf", n.conf(t, datapath), "--pod", pod)
		n.want(t, 0, "as it should be", "check", "--netns", p.NetnsPath(), "--netconf", n.conf(t, datapath), "--pod", pod)
		cni.MustCheck(t, p)
		expectServed(t, app, "10.99.3.4:3306", "world")
	}
	for _, pattern := range []string{"/attachments/*.json", "/iptables/*.json"} {
		paths, err := filepath.Glob(n.runDir + pattern)
		for _, path := range paths {
			if filepath.Base(path) != own+".json" {
				t.Errorf("record %s beside the runtime's, %s", path, own)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	cni.MustDel(t, p)
	if left := n.left(t, p); len(left) > 0 {
		t.Errorf("left behind by DEL: %q", left)
	}

	conf := n.conf(t, "ebpf")
	n.want(t, 0, "is redirected", "apply", "--netns", p.NetnsPath(), "--netconf", conf, "--pod", pod)
	if r := cni.Run(t, "GC", nil, testbed.Set("cni.dev/valid-attachments", []any{})); !r.OK() {
		t.Errorf("GC: %s", r)
	}
	n.want(t, 0, "as it should be", "check", "--netns", p.NetnsPath(), "--netconf", conf, "--pod", pod)

	// Once its network namespace is gone, the attachment's name remains.
	n.want(t, 1, "is of another network namespace", "check", "--netns", testbed.NewPod(t).NetnsPath(), "--netconf", conf, "--pod", pod,
		"--container-id", fmt.Sprintf("netns-%d", p.NetnsCookie(t)))
	n.want(t, 0, "removed", "remove", "--container-id", fmt.Sprintf("netns-%d", p.NetnsCookie(t)), "--netconf", conf)
	if left := n.left(t, p); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestPrivilegedExcluded: a pod whose interface is excluded, on both inbound hooks;
// and one that eBPF can't serve.
func TestPrivilegedExcluded(t *testing.T) {
	n, p, app := begin(t)
	for _, hook := range []string{"sk_lookup", "tc"} {
		pod := n.file(t, hook+".json", p.Injected(testbed.Annotate(keyExcludeInterfaces, "eth0"), testbed.Annotate(redirect.KeyInboundHook, hook)))
		at := func(verb string) []string {
			return []string{verb, "--netns", p.NetnsPath(), "--netconf", n.conf(t, "ebpf"), "--pod", pod}
		}
		n.want(t, 0, "is redirected by ebpf", at("apply")...)
		n.want(t, 0, "as it should be", at("check")...)
		expectServed(t, app, "10.99.3.4:80", "world")
		n.want(t, 0, "removed", at("remove")[:5]...)
	}
	pod := n.file(t, "pod.json", p.Injected(testbed.Annotate(keyExcludeInterfaces, "net1")))
	at := func(verb, datapath string) []string {
		return []string{verb, "--netns", p.NetnsPath(), "--netconf", n.conf(t, datapath), "--pod", pod}
	}
	n.want(t, 1, "the pod has no net1 as yet, but eth0", at("apply", "ebpf")...)
	n.want(t, 0, "is redirected by iptables", at("apply", "auto")...)
	n.want(t, 0, "as it should be", at("check", "auto")...)
	n.want(t, 0, "removed", at("remove", "auto")[:5]...)
	if left := n.left(t, p); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestPrivilegedCgroup: a pod whose cgroup its UID does not tell.
func TestPrivilegedCgroup(t *testing.T) {
	n, p, app := begin(t)
	pod := n.file(t, "pod.json", p.Injected(func(k *testbed.KubePod) { k.Metadata.UID = "11111111-2222-3333-4444-555555555555" }))
	at := func(verb, datapath string, more ...string) []string {
		return append([]string{verb, "--netns", p.NetnsPath(), "--netconf", n.conf(t, datapath), "--pod", pod}, more...)
	}
	n.want(t, 1, "no cgroup of the pod", at("apply", "ebpf")...)
	n.want(t, 2, "not the cgroup of one pod", at("apply", "auto", "--cgroup", filepath.Dir(p.CgroupPath()))...)
	n.want(t, 2, "--cgroup /nosuch", at("apply", "auto", "--cgroup", "/nosuch")...)
	if left := n.left(t, p); len(left) > 0 {
		t.Errorf("left behind by applies that failed: %q", left)
	}
	n.want(t, 0, "is redirected by iptables (no-pod-cgroup: ", at("apply", "auto")...)
	n.want(t, 0, "as it should be", at("check", "auto")...)
	n.want(t, 6, "the pod is to be redirected by ebpf", at("check", "ebpf")...)
	n.want(t, 0, "is redirected by ebpf (served: ", at("apply", "auto", "--cgroup", p.CgroupPath())...)
	startProxy(t, p)
	// By now it is known.
	n.want(t, 0, "is redirected by ebpf (configured: ", at("apply", "ebpf")...)
	expectServed(t, app, "10.99.3.4:80", "out")
	n.want(t, 6, "the pod is to be redirected by iptables", at("check", "iptables")...)
	n.want(t, 0, "removed", at("remove", "auto")...)
	if left := n.left(t, p); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestPrivilegedRunning: in a pod whose proxy listens already, inbound
// connections are served at once.
func TestPrivilegedRunning(t *testing.T) {
	n, p, app := begin(t)
	proxy := startProxy(t, p)
	pod := n.file(t, "pod.json", p.Injected())
	at := func(verb, datapath string) []string {
		return []string{verb, "--netns", p.NetnsPath(), "--netconf", n.conf(t, datapath), "--pod", pod}
	}
	inbound := func(by, errno string) {
		t.Helper()
		for _, a := range p.AllAddrs() {
			if r := p.World.Dial(t, netip.AddrPortFrom(a, 8080).String()); r.Listener() != by || r.Errno != errno {
				t.Errorf("inbound to %v: %+v, want %q %s", a, r, by, errno)
			}
		}
	}
	for range 2 {
		n.want(t, 0, "is redirected by ebpf (served: ", at("apply", "auto")...)
	}
	n.want(t, 0, "as it should be", at("check", "auto")...)
	expectServed(t, app, "10.99.3.4:80", "out")
	inbound("in", "")

	for _, datapath := range []string{"iptables", "ebpf"} {
		n.want(t, 0, "is redirected by "+datapath+" (configured: ", at("apply", datapath)...)
		inbound("in", "")
	}
	proxy.Stop(t)
	inbound("", "ECONNREFUSED")
	startProxy(t, p)
	inbound("in", "")
	n.want(t, 0, "removed", at("remove", "auto")...)
	if left := n.left(t, p); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestPrivilegedMoved: the path by which a network namespace was known leads
// there no more.
func TestPrivilegedMoved(t *testing.T) {
	n, p, app := begin(t)
	pod, conf := n.file(t, "pod.json", p.Injected()), n.conf(t, "iptables")
	passing := fmt.Sprintf("/proc/%d/ns/net", app.PID)
	n.want(t, 0, "is redirected", "apply", "--netns", passing, "--netconf", conf, "--pod", pod)
	app.Stop(t)
	n.want(t, 1, "run `shunt apply --netns "+p.NetnsPath(), "remove", "--netns", p.NetnsPath(), "--netconf", conf)
	n.want(t, 0, "is redirected", "apply", "--netns", p.NetnsPath(), "--netconf", conf, "--pod", pod)
	n.want(t, 0, "removed", "remove", "--netns", p.NetnsPath(), "--netconf", conf)
	if left := n.left(t, p); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestPrivilegedRender: iptables-restore takes what render prints, and it is
// what apply programs.
func TestPrivilegedRender(t *testing.T) {
	n, p, _ := begin(t)
	files, err := fs.Glob(os.DirFS(pods), "*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if file == "bad-annotation.yaml" {
			continue
		}
		fresh := testbed.NewPod(t, testbed.InWorld(p.World))
		for _, family := range []int{4, 6} {
			text := n.want(t, 0, "", "render", "--pod", filepath.Join(pods, file), "--family", fmt.Sprint(family))
			fresh.IPTablesRestore(t, family, text)
		}
	}
}

// asOfAnotherBuild gives this build's datapath another's name, and has the records
// of its pods say so.
func (n *node) asOfAnotherBuild(t *testing.T) {
	t.Helper()
	const other = "datapath-0123456789abcdef"
	if err := os.Rename(filepath.Join(n.bpfDir, loader.ThisBuild()), filepath.Join(n.bpfDir, other)); err != nil {
		t.Fatal(err)
	}
	records, err := filepath.Glob(n.runDir + "/attachments/*.json")
	if err != nil || len(records) == 0 {
		t.Fatalf("records: %q, %v", records, err)
	}
	for _, path := range records {
		record, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		record = bytes.ReplaceAll(record, []byte(loader.ThisBuild()), []byte(other))
		if err := os.WriteFile(path, record, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPrivilegedExamples: the verbs that write do what help and documentation
// show.
func TestPrivilegedExamples(t *testing.T) {
	n, p, app := begin(t)
	_ = n.conf(t, "auto")
	meshed, err := os.ReadFile(filepath.Join(pods, "meshed.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	pod := n.file(t, "meshed.yaml", []byte(strings.ReplaceAll(string(meshed), "5a0b5c2e-7f0d-4a43-8d0e-3f6b6f0e9a77", p.UID)))
	instead := strings.NewReplacer("/run/netns/reviews", p.NetnsPath(), "meshed.yaml", pod)
	back := strings.NewReplacer(fmt.Sprintf("netns-%d", p.NetnsCookie(t)), "netns-17", p.NetnsPath(), "/run/netns/reviews")
	do := func(verb string) {
		t.Helper()
		n.want(t, 0, "", verb, "--netns", p.NetnsPath(), "--netconf", n.conf(t, "auto"), "--pod", pod)
	}
	tried := map[string]int{}
	for _, e := range examples(t) {
		if !e.root {
			continue
		}
		args, _ := e.args()
		if args[0] != "apply" && tried["apply"] == 0 {
			continue // help's order is the alphabet's
		}
		for i := range args {
			args[i] = instead.Replace(args[i])
		}
		if args[0] != "apply" { // help shows each verb alone
			do("apply")
		}
		if args[0] == "status" { // of a pod that has just come, and has made two connections and got one
			if tried["status"] == 0 {
				startProxy(t, p)
			}
			do("remove")
			do("apply")
			expectServed(t, app, "10.99.3.4:80", "out")
			expectServed(t, app, "10.99.3.4:3306", "world")
			if r := p.World.Dial(t, p.Addr4().String()+":9080"); r.Listener() != "in" {
				t.Errorf("inbound: %+v", r)
			}
		}
		if args[0] == "upgrade" { // of a pod that another build has set up
			n.asOfAnotherBuild(t)
		}
		if args[0] == "trace" { // while the app and a client connect
			e.compareTraced(t, n.traceWhile(t, append(args, "--netconf", n.conf(t, "auto")), func() {
				expectServed(t, app, "10.99.3.4:80", "out")
				expectServed(t, app, "10.99.3.4:3306", "world")
				p.World.Dial(t, p.Addr4().String()+":9080")
			}))
			tried[args[0]]++
			continue
		}
		out := n.want(t, 0, "", append(args, "--netconf", n.conf(t, "auto"))...)
		e.compare(t, back.Replace(out))
		tried[args[0]]++
	}
	for verb, want := range map[string]int{"apply": 2, "check": 2, "remove": 2, "status": 3, "trace": 2, "upgrade": 2} {
		if tried[verb] != want {
			t.Errorf("%s: %d examples in help and documentation, want %d", verb, tried[verb], want)
		}
	}
	do("remove")
	if left := n.left(t, p); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
