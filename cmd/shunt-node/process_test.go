// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"shunt.dev/shunt/internal/answer"
	"shunt.dev/shunt/internal/fakekube"
	"shunt.dev/shunt/internal/kubeapi"
	"shunt.dev/shunt/internal/testbed"
)

// These tests run shunt-node as a process, on directories of their own and with
// an API server that lets it do what the chart allows.

// TestProcessLife: an agent starts, is ready, serves, and is replaced by another.
func TestProcessLife(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.kube.Set(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"}, Spec: corev1.PodSpec{NodeName: nodeName}})
	a := b.start()
	a.ready()
	b.expectInstalled()
	_, body := a.get("health", "/readyz")
	for _, want := range []string{
		"[ok ] netconf: " + filepath.Join(b.etc, "netconf.json") + " is in force",
		"[ok ] install: the plugin is in " + filepath.Join(b.conf, confName) + " since ",
		"[ok ] datapath: ",
		"[ok ] pods: 1 pods of node node-1 are known",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("/readyz lacks %q:\n%s", want, body)
		}
	}
	if code, body := a.get("health", "/healthz"); code != http.StatusOK || body != "ok\n" {
		t.Errorf("/healthz: %d, %s", code, body)
	}
	_, body = a.get("metrics", "/metrics")
	for _, want := range []string{
		"shunt_install_ready 1\n", `shunt_install_total{result="installed"} 1` + "\n", `shunt_pods{backend="ebpf"} 0` + "\n",
		`shunt_pods{backend="iptables"} 0` + "\n", "go_goroutines ", "process_start_time_seconds ",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("/metrics lacks %q", want)
		}
	}
	a.end()
	b.expectInstalled()
	a.expectLog("the agent ends; the plugin stays", "is for every node")
	before := b.read(filepath.Join(b.conf, confName))
	a = b.start()
	a.ready()
	a.end()
	if now := b.read(filepath.Join(b.conf, confName)); now != before {
		t.Errorf("the second agent has changed the configuration:\n%s\nto\n%s", before, now)
	}
}

// TestProcessEnd: what becomes of the plugin when the agent is told to end.
func TestProcessEnd(t *testing.T) {
	t.Parallel()
	remove := func(b *bed) { fakekube.Remove[*appsv1.DaemonSet](b.kube, "shunt", "shunt-node") }
	for _, tc := range []struct {
		name string
		then func(b *bed, a *agentProcess)
		gone bool
		log  []string
	}{
		{"deleted", func(b *bed, _ *agentProcess) { remove(b) }, true, []string{"the plugin goes", "is deleted"}},
		{"deleted with its rights", func(b *bed, a *agentProcess) {
			remove(b)
			a.expectLog("DaemonSet is deleted")
			b.kube.RevokeToken(b.token)
		}, true, []string{"the plugin goes", "is deleted"}},
		{"selects other nodes", func(b *bed, _ *agentProcess) {
			fakekube.Update(b.kube, "shunt", "shunt-node", func(d *appsv1.DaemonSet) {
				d.Spec.Template.Spec.NodeSelector = map[string]string{"pool": "other"}
			})
		}, true, []string{"the plugin goes", "does not select node node-1"}},
		{"upgraded", func(b *bed, _ *agentProcess) {
			fakekube.Update(b.kube, "shunt", "shunt-node", func(d *appsv1.DaemonSet) {
				d.Spec.Template.Spec.Containers = []corev1.Container{{Name: "agent", Image: "shunt:next"}}
			})
		}, false, []string{"the plugin stays"}},
		{"the API server is down", func(b *bed, _ *agentProcess) { b.kube.Down() }, false, []string{"level=WARN", "can't be told", "shunt-node uninstall", "refused"}},
		{"no rights any more", func(b *bed, _ *agentProcess) { b.kube.RevokeToken(b.token) }, false, []string{"can't be told", "Unauthorized"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			a := b.start()
			a.ready()
			testbed.Eventually(t, "the watches", func() bool { return b.kube.Watches() == 2 })
			tc.then(b, a)
			a.end()
			a.expectLog(tc.log...)
			if tc.gone {
				b.expectGone()
			} else {
				b.expectInstalled()
			}
		})
	}
}

// TestProcessAPIDown: an agent that starts while the API server is down installs
// the plugin: a pod of the mesh then fails and is tried again, in place of one
// that goes around its proxy.
func TestProcessAPIDown(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.kube.Down()
	a := b.start()
	a.readyz(http.StatusServiceUnavailable, "[ok ] install: ")
	a.readyz(http.StatusServiceUnavailable, "[NOT] pods: the node's pods have not been listed yet")
	b.expectInstalled()
	if code, body := a.get("health", "/healthz"); code != http.StatusOK {
		t.Errorf("/healthz: %d, %s", code, body)
	}
	if err := b.kube.Up(); err != nil {
		t.Fatal(err)
	}
	a.ready()
	b.kube.Down()
	a.ready() // it knows its pods
	a.end()
	b.expectInstalled()
}

// expectPod fails the test unless the plugin, by its kubeconfig, gets a pod.
func (b *bed) expectPod() {
	b.t.Helper()
	if _, err := kubeapi.NewClient(filepath.Join(b.run, "kubeconfig"), "test").Pod(b.t.Context(), "shop", "p"); err != nil {
		b.t.Error(err)
	}
}

// minted counts the tokens that were asked for.
func (b *bed) minted() (n int) {
	for _, r := range b.kube.Requests() {
		if r.Resource == "serviceaccounts/token" {
			n++
		}
	}
	return n
}

// kubeconfigHas waits until the plugin's kubeconfig has a token.
func (b *bed) kubeconfigHas(token func() string) {
	b.t.Helper()
	testbed.Eventually(b.t, "the kubeconfig with the token", func() bool {
		data, err := os.ReadFile(filepath.Join(b.run, "kubeconfig"))
		return err == nil && strings.Contains(string(data), `"`+token()+`"`)
	})
}

// TestProcessToken: the plugin's kubeconfig outlives the agent's pod.
func TestProcessToken(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.kube.Set(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"}})
	path := filepath.Join(b.run, "token")
	a := b.start()
	a.expectLog("a token that does not end with this pod", "expires=")
	own := b.read(path)
	if own == b.token {
		t.Fatal("it is the pod's")
	}
	b.kubeconfigHas(func() string { return own })
	a.end()
	b.kube.RevokeToken(b.token)
	b.expectInstalled()
	b.expectPod()

	// The next one goes on with it.
	b.podToken()
	a = b.start()
	a.ready()
	a.end()
	if now := b.read(path); now != own || b.minted() != 1 {
		t.Errorf("%d tokens were made; the file has another: %v", b.minted(), now != own)
	}
	b.kube.RevokeToken(b.token)
	b.expectPod()

	// By hand, and by an account that is another one of the name.
	for _, then := range []func(){
		func() {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
		func() {
			b.kube.Set(&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "shunt", Name: "shunt-node", UID: "another"}})
		},
	} {
		before := b.minted()
		then()
		b.podToken()
		a = b.start()
		a.expectLog("a token that does not end with this pod")
		b.kubeconfigHas(func() string { return b.read(path) })
		a.end()
		b.kube.RevokeToken(b.token)
		if now := b.read(path); now == own || b.minted() != before+1 {
			t.Errorf("%d tokens were made; the file has the same: %v", b.minted()-before, now == own)
		}
		b.expectPod()
	}
}

// TestProcessTokenRefused: where there is no other, the kubeconfig has the pod's
// token, and the agent is ready.
func TestProcessTokenRefused(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.kube.Set(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"}})
	b.grants = b.grants[:2]
	b.podToken()
	a := b.start()
	a.expectLog("level=WARN", "has the token of the agent's pod", `cannot create resource \"serviceaccounts/token\"`, "remedy=", "the chart's Role")
	a.ready()
	b.kubeconfigHas(func() string { return b.token })
	testbed.Eventually(t, "another attempt", func() bool { return b.minted() >= 2 })
	if n := a.logged("has the token of the agent's pod"); n != 1 {
		t.Errorf("said %d times", n)
	}
	b.expectPod()
	a.end()
}

// TestProcessNetconf: the netconf in force is the last valid one.
func TestProcessNetconf(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.write(filepath.Join(b.etc, "netconf.json"), `{"type": "shunt-cni", "datapath": "bpf"}`)
	a := b.start()
	a.readyz(http.StatusServiceUnavailable, `[NOT] netconf: `+filepath.Join(b.etc, "netconf.json")+`: parse network configuration: datapath: "bpf" is not one of`)
	a.readyz(http.StatusServiceUnavailable, `[NOT] install: there is no valid netconf`)
	a.expectLog("level=ERROR", "the netconf is refused", "datapath")
	if b.entry() != nil {
		t.Error("it is installed")
	}
	b.netconf("")
	a.ready()
	b.expectInstalled()

	expect := func(level any) {
		t.Helper()
		testbed.Eventually(t, "the entry to change", func() bool { return b.entry()["logLevel"] == level })
		a.ready()
	}
	b.netconf(`"logLevel": "debug"`)
	expect("debug")
	b.netconf(`"logLevel": "loud"`)
	a.readyz(http.StatusServiceUnavailable, "the configuration before stays in force")
	b.expectInstalled()
	if got := b.entry()["logLevel"]; got != "debug" {
		t.Errorf("logLevel of the entry is %v", got)
	}
	b.netconf(`"logLevel": "info"`)
	expect("info")
	if n := a.logged("the netconf is refused"); n != 2 {
		t.Errorf("refused %d times in the log", n)
	}
	a.end()
}

// TestProcessStatus: what the plugin answers to STATUS is what /readyz says.
func TestProcessStatus(t *testing.T) {
	b := newBed(t)
	b.netconf(`"datapath": "iptables"`)
	a := b.start()
	a.ready()
	say := func(able bool, text string) {
		t.Helper()
		if err := answer.Write(b.run, answer.Status{Able: able, Datapath: "iptables", Text: text}); err != nil {
			t.Fatal(err)
		}
	}
	say(false, "no iptables programs: install the package iptables")
	a.readyz(http.StatusServiceUnavailable, "[NOT] datapath: no pod can be set up, as the plugin answers STATUS: no iptables programs: install the package iptables\n")
	if _, body := a.get("metrics", "/metrics"); !strings.Contains(body, `shunt_ready{condition="datapath"} 0`) || !strings.Contains(body, `shunt_ready{condition="install"} 1`) {
		t.Errorf("metrics:\n%s", body)
	}
	say(true, "pods get iptables")
	a.readyz(http.StatusOK, "[ok ] datapath: pods get iptables: datapath iptables (netconf)\n")
}

// TestProcessSecondSignal: the second signal ends the agent at once.
func TestProcessSecondSignal(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	a := b.start()
	a.ready()
	testbed.Eventually(t, "the watches", func() bool { return b.kube.Watches() == 2 })
	b.kube.Fail(fakekube.Fault{Resource: "daemonsets", Hang: true})
	asked := len(b.kube.Requests())
	a.signal(syscall.SIGTERM)
	testbed.Eventually(t, "the question", func() bool { return len(b.kube.Requests()) > asked })
	a.signal(syscall.SIGTERM)
	if code := a.wait(); code != exitFailed {
		t.Errorf("it ended with %d", code)
	}
	if n := a.logged("again: ended at once"); n != 1 { // before the question's own end
		t.Errorf("%d times in the log", n)
	}
	b.expectInstalled()
}

// TestProcessUninstall: by hand, while no agent runs.
func TestProcessUninstall(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	a := b.start()
	a.ready()
	a.end()
	b.expectInstalled()
	for range 2 {
		if out, err := b.command(append([]string{"uninstall"}, b.pathFlags()...)...).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		b.expectGone()
	}
}

// TestProcessGone: where only a new process can go on, the agent ends, and says
// why.
func TestProcessGone(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	a := b.start()
	a.ready()
	if err := os.RemoveAll(b.conf); err != nil {
		t.Fatal(err)
	}
	// The directory stays there for a process in which it is mounted; this one
	// looks by its name.
	a.readyz(http.StatusServiceUnavailable, "[NOT] install: ")
	if code, _ := a.get("health", "/healthz"); code != http.StatusOK {
		t.Errorf("/healthz: %d", code)
	}
	if err := os.Mkdir(b.conf, 0o755); err != nil {
		t.Fatal(err)
	}
	b.write(filepath.Join(b.conf, confName), foreign)
	a.ready()
	b.expectInstalled()
}

func TestRun(t *testing.T) {
	agent := []string{"agent", "--namespace=shunt", "--node=n"}
	getenv := func(string) string { return "" }
	for _, tc := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"nothing", nil, exitUsage, "usage: shunt-node COMMAND"},
		{"unknown", []string{"install"}, exitUsage, "usage: shunt-node COMMAND"},
		{"help", []string{"help"}, 0, "uninstall"},
		{"version", []string{"version"}, 0, "shunt-node dev, BPF digest "},
		{"flags", []string{"agent", "-h"}, 0, "-cni-conf-file-name"},
		{"unknown flag", []string{"agent", "--nope"}, exitUsage, "not defined: -nope"},
		{"argument", append(agent, "now"), exitUsage, `unexpected argument "now"`},
		{"no namespace", []string{"agent", "--node=n"}, exitUsage, "$POD_NAMESPACE"},
		{"no node", []string{"agent", "--namespace=shunt"}, exitUsage, "$NODE_NAME"},
		{"relative", append(agent, "--run-dir=run"), exitUsage, `--run-dir: "run" is not an absolute path`},
		{"level", append(agent, "--log-level=loud"), exitUsage, `--log-level: "loud" is not debug`},
		{"no pod", agent, exitFailed, "outside of a pod, give --kubeconfig"},
		{"no kubeconfig", append(agent, "--kubeconfig=/none/such"), exitFailed, "--kubeconfig: "},
		{"uninstall, relative", []string{"uninstall", "--cni-bin-dir=bin"}, exitUsage, "--cni-bin-dir"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			if code := run(tc.args, getenv, &out, &out); code != tc.code || !strings.Contains(out.String(), tc.want) {
				t.Errorf("%d: %s", code, out.String())
			}
		})
	}
}

// TestKubeconfigOfFiles: the plugin's kubeconfig is made of files, so that it can
// follow them.
func TestKubeconfigOfFiles(t *testing.T) {
	kube := fakekube.Start(t)
	path := kube.WriteKubeconfig(t, t.TempDir())
	var out bytes.Buffer
	if code := run([]string{"agent", "--namespace=shunt", "--node=n", "--kubeconfig=" + path, "--run-dir=" + t.TempDir()},
		func(string) string { return "" }, &out, &out); code != exitFailed || !strings.Contains(out.String(), "expected a user with tokenFile") {
		t.Errorf("%d: %s", code, out.String())
	}
}
