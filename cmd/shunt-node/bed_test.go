// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"shunt.dev/shunt/internal/fakekube"
	"shunt.dev/shunt/internal/testbed"
)

// asNode makes the test binary behave as shunt-node.
const asNode = "SHUNT_NODE_TEST_AS_NODE"

func TestMain(m *testing.M) {
	if os.Getenv(asNode) != "" {
		main()
		os.Exit(0)
	}
	testbed.Main(m)
}

// foreign is the CNI configuration that others have made.
const foreign = `{
  "cniVersion": "1.0.0",
  "name": "others",
  "plugins": [
    {"type": "ptp",  "mtu": 1e3}
  ]
}
`

const (
	nodeName  = "node-1"
	confName  = "10-others.conflist"
	baseEntry = `"type": "shunt-cni", "podFactsTimeout": "20s"`
)

// A bed is a node with the directories that an agent works on, and an API
// server with its DaemonSet.
type bed struct {
	t    *testing.T
	kube *fakekube.Server

	token  string           // of the agent's pod
	grants []fakekube.Grant // its account's

	bin, conf, run, binaries, etc, bpf, cache string

	program string   // empty: the test binary
	flags   []string // further ones
	wrap    func(*exec.Cmd)
}

// newBed makes a node on which others have made a configuration.
func newBed(t *testing.T) *bed {
	t.Helper()
	dir := t.TempDir()
	b := &bed{t: t, kube: fakekube.Start(t)}
	for name, p := range map[string]*string{
		"bin": &b.bin, "conf": &b.conf, "run": &b.run, "binaries": &b.binaries, "etc": &b.etc, "cache/results": &b.cache,
	} {
		*p = filepath.Join(dir, name)
		if err := os.MkdirAll(*p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.cache = filepath.Dir(b.cache)
	b.bpf = filepath.Join(dir, "bpf")
	b.write(filepath.Join(b.conf, confName), foreign)
	for _, name := range []string{"shunt-cni", "shunt"} {
		b.write(filepath.Join(b.binaries, name), "#!/bin/sh\necho "+name+"\n")
		if err := os.Chmod(filepath.Join(b.binaries, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.netconf("")
	b.write(filepath.Join(b.etc, "ca.crt"), string(b.kube.CA()))
	b.write(filepath.Join(b.etc, "agent.kubeconfig"), `{"apiVersion":"v1","kind":"Config",
"clusters":[{"name":"c","cluster":{"server":"`+b.kube.URL()+`","certificate-authority":"`+filepath.Join(b.etc, "ca.crt")+`"}}],
"users":[{"name":"u","user":{"tokenFile":"`+filepath.Join(b.etc, "token")+`"}}],
"contexts":[{"name":"x","context":{"cluster":"c","user":"u"}}],"current-context":"x"}`)
	// What the chart allows the agent, and no more.
	b.grants = []fakekube.Grant{
		{Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "list", "watch"}},
			{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get"}},
		}},
		{Namespace: "shunt", Rules: []rbacv1.PolicyRule{{
			APIGroups: []string{"apps"}, Resources: []string{"daemonsets"}, ResourceNames: []string{"shunt-node"}, Verbs: []string{"get", "list", "watch"},
		}}},
		{Namespace: "shunt", Rules: []rbacv1.PolicyRule{{
			APIGroups: []string{""}, Resources: []string{"serviceaccounts/token"}, ResourceNames: []string{"shunt-node"}, Verbs: []string{"create"},
		}}},
	}
	b.kube.Set(
		&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "shunt", Name: "shunt-node"}},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}},
		&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "shunt", Name: "shunt-node"}},
	)
	b.podToken()
	return b
}

// podToken gives the agent's pod a token, as each pod gets one of its own.
func (b *bed) podToken() {
	b.t.Helper()
	b.token = b.kube.AccountToken("shunt", "shunt-node", "shunt-node-x", time.Hour, b.grants...)
	b.write(filepath.Join(b.etc, "token"), b.token)
}

func (b *bed) write(path, text string) {
	b.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) read(path string) string {
	b.t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		b.t.Fatal(err)
	}
	return string(data)
}

// netconf writes the ConfigMap's file, as the kubelet does: in one step. more is
// further keys.
func (b *bed) netconf(more string) {
	b.t.Helper()
	text := "{" + baseEntry + fmt.Sprintf(`, "runDir": %q, "bpfDir": %q`, b.run, b.bpf)
	if more != "" {
		text += ", " + more
	}
	b.write(filepath.Join(b.etc, "next"), text+"}")
	if err := os.Rename(filepath.Join(b.etc, "next"), filepath.Join(b.etc, "netconf.json")); err != nil {
		b.t.Fatal(err)
	}
}

// pathFlags are those that agent and uninstall have.
func (b *bed) pathFlags() []string {
	return []string{
		"--cni-bin-dir=" + b.bin, "--cni-conf-dir=" + b.conf, "--run-dir=" + b.run,
		"--binaries-dir=" + b.binaries, "--cni-cache-dir=" + b.cache,
	}
}

// command makes a command of shunt-node's.
func (b *bed) command(args ...string) *exec.Cmd {
	program := b.program
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	if program == "" {
		program = os.Args[0]
		env = append(env, asNode+"=1", "GORACE=atexit_sleep_ms=0")
	}
	cmd := exec.Command(program, args...)
	cmd.Env = env
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// An agentProcess is a running agent.
type agentProcess struct {
	b    *bed
	cmd  *exec.Cmd
	out  logBuffer
	done chan struct{}
	err  error
}

// logBuffer collects what a process writes, for reading meanwhile.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start starts an agent. It is killed when the test ends, if it still runs.
func (b *bed) start() *agentProcess {
	b.t.Helper()
	args := append([]string{"agent"}, b.pathFlags()...)
	args = append(args, "--netconf="+filepath.Join(b.etc, "netconf.json"), "--namespace=shunt", "--node="+nodeName,
		"--kubeconfig="+filepath.Join(b.etc, "agent.kubeconfig"), "--metrics-address=127.0.0.1:0", "--health-address=127.0.0.1:0")
	a := &agentProcess{b: b, cmd: b.command(append(args, b.flags...)...), done: make(chan struct{})}
	a.cmd.Stdout, a.cmd.Stderr = &a.out, &a.out
	if b.wrap != nil {
		b.wrap(a.cmd)
	}
	if err := a.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	go func() {
		a.err = a.cmd.Wait()
		close(a.done)
	}()
	b.t.Cleanup(func() {
		if b.t.Failed() {
			b.t.Logf("log of agent %d:\n%s", a.cmd.Process.Pid, a.out.String())
		}
		a.kill()
	})
	return a
}

func (a *agentProcess) kill() {
	_ = a.cmd.Process.Kill() // it may have ended
	<-a.done
}

// address gives where the agent serves, once it does.
func (a *agentProcess) address(what string) (address string) {
	a.b.t.Helper()
	testbed.Eventually(a.b.t, "the agent to serve "+what, func() bool {
		_, after, ok := strings.Cut(a.out.String(), "what="+what+" address=")
		address, _, _ = strings.Cut(after, "\n")
		return ok && address != ""
	})
	return address
}

func (a *agentProcess) get(what, path string) (int, string) {
	a.b.t.Helper()
	resp, err := http.Get("http://" + a.address(what) + path)
	if err != nil {
		a.b.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		a.b.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// ready waits until the agent is ready.
func (a *agentProcess) ready() {
	a.b.t.Helper()
	a.readyz(http.StatusOK, "")
}

// readyz waits until /readyz answers so.
func (a *agentProcess) readyz(code int, want string) {
	a.b.t.Helper()
	var got int
	var body string
	if !testbed.Poll(30*time.Second, func() bool {
		got, body = a.get("health", "/readyz")
		return got == code && strings.Contains(body, want)
	}) {
		a.b.t.Fatalf("/readyz: %d\n%s\nwant %d, %s", got, body, code, want)
	}
}

// expectLog waits for a line of the log that has all of these.
func (a *agentProcess) expectLog(parts ...string) {
	a.b.t.Helper()
	if !testbed.Poll(30*time.Second, func() bool { return a.logged(parts...) > 0 }) {
		a.b.t.Errorf("the log has no line with %q:\n%s", parts, a.out.String())
	}
}

// logged counts the lines that have all of these.
func (a *agentProcess) logged(parts ...string) (n int) {
	for line := range strings.Lines(a.out.String()) {
		all := true
		for _, p := range parts {
			all = all && strings.Contains(line, p)
		}
		if all {
			n++
		}
	}
	return n
}

func (a *agentProcess) signal(sig os.Signal) {
	a.b.t.Helper()
	if err := a.cmd.Process.Signal(sig); err != nil {
		a.b.t.Fatal(err)
	}
}

// wait waits for the agent's end, and gives its exit status.
func (a *agentProcess) wait() int {
	a.b.t.Helper()
	select {
	case <-a.done:
	case <-time.After(30 * time.Second): // the DaemonSet's terminationGracePeriodSeconds
		a.b.t.Fatal("the agent does not end")
	}
	return a.cmd.ProcessState.ExitCode()
}

// end ends the agent as the kubelet does, and expects that it ends well.
func (a *agentProcess) end() {
	a.b.t.Helper()
	a.signal(syscall.SIGTERM)
	if code := a.wait(); code != 0 {
		a.b.t.Errorf("the agent ended with %d", code)
	}
}

// entry gives the plugin's entry in the configuration, nil where there is none.
func (b *bed) entry() map[string]any {
	b.t.Helper()
	var list struct{ Plugins []map[string]any }
	if err := json.Unmarshal([]byte(b.read(filepath.Join(b.conf, confName))), &list); err != nil {
		b.t.Fatal(err)
	}
	if last := list.Plugins[len(list.Plugins)-1]; last["type"] == "shunt-cni" {
		return last
	}
	return nil
}

// expectInstalled fails the test unless the plugin is on the node.
func (b *bed) expectInstalled() {
	b.t.Helper()
	if b.entry() == nil {
		b.t.Error("there is no entry in the CNI configuration")
	}
	for path, mode := range map[string]os.FileMode{
		filepath.Join(b.bin, "shunt-cni"):  0o755,
		filepath.Join(b.bin, "shunt"):      0o755,
		filepath.Join(b.run, "kubeconfig"): 0o600,
		filepath.Join(b.run, "token"):      0o600,
		filepath.Join(b.run, "agent"):      0o600,
	} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != mode {
			b.t.Errorf("%s: %v, %v", path, st, err)
		}
	}
	if got := b.read(filepath.Join(b.run, "agent")); got != "shunt/shunt-node\n" {
		b.t.Errorf("the agent's name is %q", got)
	}
}

// expectGone fails the test unless nothing of the plugin is on the node.
func (b *bed) expectGone() {
	b.t.Helper()
	if got := b.read(filepath.Join(b.conf, confName)); got != foreign {
		b.t.Errorf("the CNI configuration is not what it was: %s", got)
	}
	for _, path := range []string{
		filepath.Join(b.bin, "shunt-cni"), filepath.Join(b.bin, "shunt"), filepath.Join(b.run, "kubeconfig"),
		filepath.Join(b.run, "token"), filepath.Join(b.run, "agent"), filepath.Join(b.run, "agent.sock"),
	} {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			b.t.Errorf("%s is there (%v)", path, err)
		}
	}
}
