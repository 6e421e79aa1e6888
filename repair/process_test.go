// SPDX-License-Identifier: Apache-2.0

//go:build linux

package repair

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"shunt.dev/shunt/internal/fakekube"
	"shunt.dev/shunt/internal/testbed"
)

// asController in the environment makes the test binary `shunt-node repair`. Its
// pace may be another, by asPace: sweeps come every second, containers that just
// started are looked at, and attempts follow each other fast.
const (
	asController = "SHUNT_TEST_AS_CONTROLLER"
	asPace       = "SHUNT_TEST_PACE"
)

func TestMain(m *testing.M) {
	if os.Getenv(asController) != "" {
		if names := os.Getenv(asCapped); names != "" {
			// The capabilities are a thread's: it becomes a program anew, by which
			// all of its threads have the same.
			runtime.LockOSThread()
			var keep []int
			for name := range strings.SplitSeq(names, ",") {
				keep = append(keep, needed[name])
			}
			env := slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, asCapped+"=") })
			err := confine(keep)
			if err == nil {
				err = syscall.Exec("/proc/self/exe", os.Args, env)
			}
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		p := usualPace
		if os.Getenv(asPace) != "" {
			p.sweepEvery, p.grace, p.settle, p.retryFirst, p.retryMost = 300*time.Millisecond, 0, 50*time.Millisecond, 50*time.Millisecond, time.Second
			p.qps, p.burst = 100, 1
		}
		exit := run(ctx, os.Args[1:], os.Stderr, os.Getenv, p)
		stop()
		os.Exit(exit)
	}
	testbed.Main(m)
}

// A command is a controller in a process of its own.
type command struct {
	*exec.Cmd
	out  lockedBuffer
	done chan struct{} // closed when it has ended
	err  error         // of Wait; read after done
}

// startCommand starts one; edit may change how.
func startCommand(t *testing.T, kubeconfig, netconf string, edit func(*exec.Cmd), args ...string) *command {
	t.Helper()
	c := &command{done: make(chan struct{}), Cmd: exec.Command("/proc/self/exe", append([]string{
		"--kubeconfig", kubeconfig, "--netconf", netconf, "--node", testNode, "--log-level=debug",
		"--metrics-address=127.0.0.1:0", "--health-address=127.0.0.1:0",
	}, args...)...)}
	c.Env = append(os.Environ(), asController+"=1", asPace+"=1", "GORACE=atexit_sleep_ms=0")
	c.Stdout, c.Stderr = &c.out, &c.out
	if edit != nil {
		edit(c.Cmd)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		c.err = c.Wait()
		close(c.done)
	}()
	t.Cleanup(func() {
		_ = c.Process.Signal(syscall.SIGTERM)
		timer := time.AfterFunc(patience, func() { _ = c.Process.Kill() })
		defer timer.Stop()
		<-c.done
		if t.Failed() {
			t.Logf("a controller's output:\n%s", c.out.String())
		}
	})
	return c
}

// kill ends it as nothing else does.
func (c *command) kill(t *testing.T) {
	t.Helper()
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-c.done
}

func (c *command) ended() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// get asks one of its addresses.
func (c *command) get(t *testing.T, flag, path string) (string, int) {
	t.Helper()
	var at string
	eventually(t, "its address", func() bool {
		for line := range strings.Lines(c.out.String()) {
			if strings.Contains(line, "for="+flag) {
				at = line[strings.LastIndex(line, "at=")+len("at="):]
			}
		}
		return at != ""
	})
	r, err := http.Get("http://" + strings.TrimSpace(at) + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body), r.StatusCode
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestNetconf: another configuration ends the controller, to be started anew with
// it; one that is refused does not.
func TestNetconf(t *testing.T) {
	s := fakekube.Start(t)
	path := write(t, filepath.Join(t.TempDir(), "netconf.json"), `{"type":"shunt-cni"}`)
	replace := func(text string) {
		t.Helper()
		if err := os.Rename(write(t, path+".new", text), path); err != nil {
			t.Fatal(err)
		}
	}
	c := startCommand(t, s.WriteKubeconfig(t, t.TempDir()), path, nil, "--repair-pods=false")
	said := func(what string) func() bool {
		return func() bool { return strings.Contains(c.out.String(), what) }
	}
	eventually(t, "a controller", said("looking after"))
	replace(`{"type":"shunt-cni","datapath":"x"}`)
	eventually(t, "a refusal that names the key", said("datapath: "))
	replace(`{"type":"shunt-cni"}`)
	replace(`{"type":"shunt-cni","datapath":"iptables"}`)
	eventually(t, "its end", c.ended)
	if c.err != nil || !said("has changed")() {
		t.Errorf("it ended with %v", c.err)
	}
}

// TestKilled: a controller that is killed in the middle, again and again, leaves
// nothing undone, and does nothing twice.
func TestKilled(t *testing.T) {
	const many = 60
	for mode, verb := range map[string]string{"delete": "delete pods", "label": "patch pods"} {
		t.Run(mode, func(t *testing.T) {
			kube, dir := fakekube.Start(t), t.TempDir()
			kube.SetGraceful(true)
			for i := range many {
				kube.Set(broken(fmt.Sprint("p", i)))
			}
			conf, kubeconfig := write(t, filepath.Join(dir, "netconf"), `{"type":"shunt-cni"}`), kube.WriteKubeconfig(t, dir)
			args := []string{"--repair-pods=false", fmt.Sprintf("--delete-pods=%v", mode == "delete")}
			rounds := 0
			for before := 0; before < many; rounds++ {
				c := startCommand(t, kubeconfig, conf, nil, args...)
				eventually(t, "a few more", func() bool { return calls(kube)[verb] >= min(before+10, many) })
				c.kill(t)
				before = calls(kube)[verb]
				if rounds > many {
					t.Fatal("it does not come to an end")
				}
			}
			last := startCommand(t, kubeconfig, conf, nil, args...)
			eventually(t, "its being ready", func() bool { _, code := last.get(t, "health-address", "/readyz"); return code == http.StatusOK })
			eventually(t, "its having looked at all", func() bool {
				body, _ := last.get(t, "metrics-address", "/metrics")
				return strings.Contains(body, "shunt_repair_pods_total")
			})
			by := map[string]int{}
			for _, r := range kube.Requests() {
				if r.Verb+" "+r.Resource == verb {
					by[r.Name]++
				}
			}
			for _, p := range fakekube.List[*corev1.Pod](kube) {
				if by[p.Name] != 1 {
					t.Errorf("pod %s: %d requests", p.Name, by[p.Name])
				}
				if done := p.DeletionTimestamp != nil || p.Labels["cni.istio.io/uninitialized"] == "true"; !done {
					t.Errorf("pod %s was left", p.Name)
				}
			}
			t.Logf("%d processes", rounds+1)
		})
	}
}

// TestReady: ready is who knows the node's pods.
func TestReady(t *testing.T) {
	kube, dir := fakekube.Start(t), t.TempDir()
	lift := kube.Fail(fakekube.Fault{Resource: "pods", Hang: true})
	c := startCommand(t, kube.WriteKubeconfig(t, dir), write(t, filepath.Join(dir, "netconf"), `{"type":"shunt-cni"}`), nil)
	if body, code := c.get(t, "health-address", "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "API server") {
		t.Errorf("readyz: %d %s", code, body)
	}
	if _, code := c.get(t, "health-address", "/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d", code)
	}
	lift()
	kube.Down()
	if err := kube.Up(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its being ready", func() bool { _, code := c.get(t, "health-address", "/readyz"); return code == http.StatusOK })
	body, _ := c.get(t, "metrics-address", "/metrics")
	for _, want := range []string{`shunt_repair_pods_total{result="ok",type="repair"} 0`, "go_goroutines"} {
		if !strings.Contains(body, want) {
			t.Errorf("metrics lack %s:\n%s", want, body)
		}
	}
	// SIGTERM is the kubelet's: it ends well.
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if <-c.done; c.err != nil {
		t.Errorf("it ended by %v", c.err)
	}
}

// TestUsage: what is wrong with flags and files is said in one line.
func TestUsage(t *testing.T) {
	dir := t.TempDir()
	good, bad := write(t, filepath.Join(dir, "good"), `{"type":"shunt-cni"}`), write(t, filepath.Join(dir, "bad"), `{"datapaht":1}`)
	kubeconfig := fakekube.Start(t).WriteKubeconfig(t, dir)
	for _, tc := range []struct {
		args []string
		exit int
		want string
	}{
		{[]string{"--nosuch"}, exitUsage, "not defined"},
		{[]string{"more"}, exitUsage, `"more": expected flags and nothing else`},
		{[]string{}, exitUsage, "--node (or $NODE_NAME): expected the name of this node"},
		{[]string{"--node=n", "--init-container-name="}, exitUsage, "--init-container-name"},
		{[]string{"--node=n", "--broken-pod-label-key=a b"}, exitUsage, `--broken-pod-label-key "a b": expected the key of a label`},
		{[]string{"--node=n", "--broken-pod-label-value=a b"}, exitUsage, `--broken-pod-label-value "a b"`},
		{[]string{"--node=n", "--run-dir=run"}, exitUsage, `--run-dir "run": expected an absolute path`},
		{[]string{"--node=n", "--cri-socket=unix://sock"}, exitUsage, `--cri-socket "sock": expected an absolute path`},
		{[]string{"--node=n", "--log-level=loud"}, exitUsage, `--log-level "loud"`},
		{[]string{"--node=n", "--netconf=" + dir + "/nosuch"}, exitFailed, "read the network configuration: open "},
		{[]string{"--node=n", "--netconf=" + bad}, exitFailed, "datapaht"},
		{[]string{"--node=n", "--netconf=" + good}, exitFailed, "give --kubeconfig"},
		{[]string{"--node=n", "--netconf=" + good, "--kubeconfig=" + dir + "/nosuch"}, exitFailed, "--kubeconfig: "},
		{[]string{"--node=n", "--netconf=" + good, "--kubeconfig=" + kubeconfig, "--health-address=nosuch"}, exitFailed, "--health-address: "},
	} {
		var errs bytes.Buffer
		exit := run(t.Context(), tc.args, &errs, func(string) string { return "" }, usualPace)
		if exit != tc.exit || !strings.Contains(errs.String(), tc.want) {
			t.Errorf("%q: exit status %d, want %d and %q:\n%s", tc.args, exit, tc.exit, tc.want, errs.String())
		}
	}
}
