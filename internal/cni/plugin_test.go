// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"shunt.dev/shunt/internal/answer"
	"shunt.dev/shunt/internal/kubeapi"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

const podUID = "6c5a0f1e-2b7d-4c3a-9e8f-001122334455"

// A bed is a plugin between fakes. Fakes that a test did not set up fail it
// when they are used.
type bed struct {
	*plugin
	t       *testing.T
	out     bytes.Buffer
	logged  bytes.Buffer
	runDir  string
	backend fakeBackend
	pod     *redirect.Pod // what the facts are; nil: they must not be asked for
	podErr  error         // their error instead
	asked   int
	args    skel.CmdArgs
}

func newBed(t *testing.T) *bed {
	b := &bed{t: t, runDir: t.TempDir()}
	b.backend.t = t
	b.backend.applied = map[redirect.Attachment]redirect.Target{}
	b.plugin = &plugin{
		stdout: &b.out,
		stderr: &b.logged,
		facts: func(conf *netconf.Config, _ *slog.Logger) FactsSource {
			return factsFunc(func(_ context.Context, namespace, name, uid string) (*redirect.Pod, error) {
				b.asked++
				if b.pod == nil && b.podErr == nil {
					t.Error("facts were asked for")
				}
				if namespace != "ns" || name != "p" || uid != podUID {
					t.Errorf("facts of %s/%s, uid %s, were asked for", namespace, name, uid)
				}
				return b.pod, b.podErr
			})
		},
		backends:   func(*netconf.Config, *slog.Logger) Programmer { return &b.backend },
		node:       func(*netconf.Config, *slog.Logger) Node { return &b.backend },
		kubeconfig: kubeapi.CheckConfig,
		checkNetns: func(path string) error {
			if path != "/run/netns/pod" {
				t.Errorf("netns %s was checked", path)
			}
			return nil
		},
		podCgroup: func(root, hint, uid string) (string, error) {
			if root != "/cg" || hint != "/hint" || uid != podUID {
				t.Errorf("the cgroup of uid %s was looked for at %s and %s", uid, root, hint)
			}
			return "/cg/pod", nil
		},
		cgroupRoot: func(string) (string, error) { return "/cg", nil },
	}
	b.args = skel.CmdArgs{
		ContainerID: "c1", Netns: "/run/netns/pod", IfName: "eth0",
		Args:      "K8S_POD_UID=" + podUID + ";IgnoreUnknown=1;K8S_POD_NAME=p;OTHER=x;K8S_POD_NAMESPACE=ns;K8S_POD_INFRA_CONTAINER_ID=c1",
		StdinData: []byte(b.conf("1.1.0", prevOf("1.1.0"))),
	}
	return b
}

// conf returns a configuration with further members, each with its key.
func (b *bed) conf(version string, more ...string) string {
	members := append([]string{
		`"type":"shunt-cni","name":"n","cniVersion":"` + version + `","cgroupRoot":"/cg","runDir":"` + b.runDir + `"`,
		`"runtimeConfig":{"cgroupPath":"/hint"}`,
	}, more...)
	return "{" + strings.Join(members, ",") + "}"
}

// prevOf returns a prevResult as it may come: no two writers format alike.
func prevOf(version string) string { return `"prevResult": ` + prevBytes(version) }

func prevBytes(version string) string {
	ipVersion := ""
	if strings.HasPrefix(version, "0.") {
		ipVersion = `"version":"4",`
	}
	return `{ "cniVersion": "` + version + `",
  "interfaces":[{"name":"br0"},{"name":"eth0","sandbox":"/run/netns/pod"}], "x": 1.0,
	"ips":[ {` + ipVersion + `"address":"10.0.0.5/24","interface":1,"gateway":"10.0.0.1"} ],"dns":{"search":["\u003ca"]} }`
}

type factsFunc func(ctx context.Context, namespace, name, uid string) (*redirect.Pod, error)

func (f factsFunc) Pod(ctx context.Context, namespace, name, uid string) (*redirect.Pod, error) {
	return f(ctx, namespace, name, uid)
}

// A fakeBackend keeps what is applied.
type fakeBackend struct {
	t        *testing.T
	applied  map[redirect.Attachment]redirect.Target
	policies []*redirect.Policy
	choices  []redirect.Choice
	notEBPF  *redirect.Reason
	removed  []redirect.Attachment
	applyErr, checkErr, removeErr,
	listErr, readyErr, sweepErr error
}

func (f *fakeBackend) Apply(_ context.Context, t redirect.Target, p *redirect.Policy, c redirect.Choice) (redirect.Choice, error) {
	switch {
	case t.ContainerID == "" || t.IfName == "" || t.Netns == "" || (t.Cgroup == "") == (t.NoCgroup == nil) || p == nil || len(c.Reasons) == 0:
		f.t.Errorf("apply %+v, policy %+v, choice %+v", t, p, c)
	case f.has(t.Attachment):
		f.t.Errorf("apply to %v twice", t.Attachment)
	}
	if f.applyErr != nil {
		return c, f.applyErr
	}
	f.applied[t.Attachment] = t
	f.policies = append(f.policies, p)
	f.choices = append(f.choices, c)
	return c, nil
}

func (f *fakeBackend) has(a redirect.Attachment) bool { _, ok := f.applied[a]; return ok }

func (f *fakeBackend) Check(_ context.Context, t redirect.Target) error {
	if f.checkErr != nil {
		return f.checkErr
	}
	if !f.has(t.Attachment) {
		return redirect.ErrNotProgrammed
	}
	return nil
}

func (f *fakeBackend) Remove(_ context.Context, a redirect.Attachment) error {
	if a.ContainerID == "" || a.IfName == "" {
		f.t.Errorf("remove %+v", a)
	}
	f.removed = append(f.removed, a)
	if f.removeErr != nil {
		return f.removeErr
	}
	delete(f.applied, a)
	return nil
}

func (f *fakeBackend) Attachments(context.Context, string) ([]redirect.Attachment, error) {
	var out []redirect.Attachment
	for a := range f.applied {
		out = append(out, a)
	}
	return out, f.listErr
}

func (f *fakeBackend) Sweep(context.Context) ([]redirect.Attachment, error) { return nil, f.sweepErr }

func (f *fakeBackend) Ready(context.Context, string) (*redirect.Reason, error) {
	return f.notEBPF, f.readyErr
}

// meshed returns a pod that is to be redirected.
func meshed(annotations ...string) *redirect.Pod {
	p := &redirect.Pod{
		ObjectMeta: redirect.ObjectMeta{
			Namespace: "ns", Name: "p", UID: podUID,
			Annotations: map[string]string{"sidecar.istio.io/status": "{}"},
		},
		PodSpec: redirect.PodSpec{Containers: []redirect.Container{{Name: "app"}, {Name: "istio-proxy"}}},
	}
	for i := 0; i+1 < len(annotations); i += 2 {
		p.Annotations[annotations[i]] = annotations[i+1]
	}
	return p
}

// plain returns a pod without a proxy.
func plain() *redirect.Pod {
	p := meshed()
	p.Containers = p.Containers[:1]
	return p
}

// wantError checks code and text of a CNI error, and that nothing was printed.
func (b *bed) wantError(err error, code uint, want string) {
	b.t.Helper()
	var e *types.Error
	switch {
	case !errors.As(err, &e):
		b.t.Errorf("got %v, want code %d: %s", err, code, want)
	case e.Code != code || !strings.Contains(e.Msg, want):
		b.t.Errorf("got code %d: %s\nwant code %d: … %s …", e.Code, e.Msg, code, want)
	}
	if b.out.Len() > 0 {
		b.t.Errorf("printed %s", &b.out)
	}
}

// TestAddPassesPrevResult: in every version, byte for byte, whether the pod is
// programmed or left alone.
func TestAddPassesPrevResult(t *testing.T) {
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for name, pod := range map[string]*redirect.Pod{"meshed": meshed(), "plain": plain()} {
			t.Run(version+" "+name, func(t *testing.T) {
				b := newBed(t)
				b.pod = pod
				b.args.StdinData = []byte(b.conf(version, prevOf(version)))
				if err := b.add(&b.args); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(prevBytes(version), b.out.String()); diff != "" {
					t.Errorf("printed (-prevResult +got):\n%s", diff)
				}
				if got, want := len(b.backend.applied), len(pod.Containers)-1; got != want {
					t.Errorf("%d attachments, want %d", got, want)
				}
			})
		}
		t.Run(version+" standalone", func(t *testing.T) {
			b := newBed(t)
			b.pod = meshed()
			b.args.StdinData = []byte(b.conf(version))
			if err := b.add(&b.args); err != nil {
				t.Fatal(err)
			}
			if got, want := b.out.String(), `{"cniVersion":"`+version+`"}`; got != want {
				t.Errorf("printed %s, want %s", got, want)
			}
			if a := b.backend.applied[redirect.Attachment{ContainerID: "c1", IfName: "eth0"}].Addrs; a != nil {
				t.Errorf("addresses %v", a)
			}
		})
	}
}

// TestAddConvertsPrevResult: one of another version comes out in the caller's.
func TestAddConvertsPrevResult(t *testing.T) {
	b := newBed(t)
	b.pod = plain()
	b.args.StdinData = []byte(b.conf("0.4.0", prevOf("1.1.0")))
	if err := b.add(&b.args); err != nil {
		t.Fatal(err)
	}
	var got struct {
		CNIVersion string
		IPs        []struct{ Version, Address string }
	}
	if err := json.Unmarshal(b.out.Bytes(), &got); err != nil || got.CNIVersion != "0.4.0" || len(got.IPs) != 1 || got.IPs[0].Version != "4" {
		t.Errorf("printed %s (%v)", &b.out, err)
	}
}

// TestAddTarget: what the backend is told.
func TestAddTarget(t *testing.T) {
	b := newBed(t)
	b.pod = meshed("traffic.sidecar.istio.io/excludeOutboundPorts", "80")
	if err := b.add(&b.args); err != nil {
		t.Fatal(err)
	}
	a := redirect.Attachment{ContainerID: "c1", IfName: "eth0"}
	want := redirect.Target{
		Attachment: a, Network: "n", Netns: "/run/netns/pod", Cgroup: "/cg/pod",
		Pod:   redirect.PodRef{Namespace: "ns", Name: "p", UID: podUID},
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.5")},
	}
	if diff := cmp.Diff(want, b.backend.applied[a], cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("target (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]redirect.PortRange{{First: 80, Last: 80}}, b.backend.policies[0].ExcludeOutboundPorts); diff != "" {
		t.Errorf("policy (-want +got):\n%s", diff)
	}
	if b.logged.Len() > 0 {
		t.Errorf("logged at level warn: %s", &b.logged)
	}
}

// TestAddWithoutCgroup: whether that matters is for the backends to say.
func TestAddWithoutCgroup(t *testing.T) {
	b := newBed(t)
	b.pod = meshed()
	b.podCgroup = func(string, string, string) (string, error) { return "", loader.ErrNoPodCgroup }
	if err := b.add(&b.args); err != nil {
		t.Fatal(err)
	}
	for _, target := range b.backend.applied {
		if target.Cgroup != "" || !errors.Is(target.NoCgroup, loader.ErrNoPodCgroup) {
			t.Errorf("target: %+v", target)
		}
	}
}

// TestAddChoice: what the configuration and the pod ask for reaches the backends.
func TestAddChoice(t *testing.T) {
	for _, tc := range []struct {
		conf string
		pod  *redirect.Pod
		want redirect.Choice
	}{
		{`"datapath":"auto"`, meshed(), redirect.Choice{Datapath: redirect.EBPF, Hook: redirect.HookSkLookup, Fallback: true}},
		{`"datapath":"ebpf"`, meshed(), redirect.Choice{Datapath: redirect.EBPF, Hook: redirect.HookSkLookup}},
		{`"inboundHook":"tc"`, meshed(), redirect.Choice{Datapath: redirect.EBPF, Hook: redirect.HookTC, Fallback: true}},
		{`"inboundHook":"sk_lookup"`, meshed(redirect.KeyDatapath, "iptables"), redirect.Choice{Datapath: redirect.Iptables}},
	} {
		b := newBed(t)
		b.pod = tc.pod
		b.args.StdinData = []byte(b.conf("1.1.0", prevOf("1.1.0"), tc.conf))
		if err := b.add(&b.args); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]redirect.Choice{tc.want}, b.backend.choices, cmpopts.IgnoreFields(redirect.Choice{}, "Reasons")); diff != "" {
			t.Errorf("%s: %s", tc.conf, diff)
		}
	}
}

// TestAddWithoutUID: the UID is taken from the facts; a static pod's cgroup is
// named after its hash.
func TestAddWithoutUID(t *testing.T) {
	for _, hash := range []string{"", "0123456789abcdef0123456789abcdef"} {
		b := newBed(t)
		pod := meshed("kubernetes.io/config.hash", hash, "kubernetes.io/config.mirror", hash)
		b.facts = func(*netconf.Config, *slog.Logger) FactsSource {
			return factsFunc(func(_ context.Context, _, _, uid string) (*redirect.Pod, error) {
				if uid != "" {
					t.Errorf("uid %s", uid)
				}
				return pod, nil
			})
		}
		b.podCgroup = func(_, _, uid string) (string, error) { return "/cg/" + uid, nil }
		b.args.Args = "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p"
		if err := b.add(&b.args); err != nil {
			t.Fatal(err)
		}
		want := "/cg/" + podUID
		if hash != "" {
			want = "/cg/" + hash
		}
		for _, target := range b.backend.applied {
			if target.Pod.UID != podUID || target.Cgroup != want {
				t.Errorf("target %+v, want cgroup %s", target, want)
			}
		}
	}
}

// untouchable makes every seam fail the test.
func (b *bed) untouchable() {
	b.backend = fakeBackend{}
	b.plugin.backends = func(*netconf.Config, *slog.Logger) Programmer {
		b.t.Error("the backend was touched")
		return &b.backend
	}
	b.checkNetns = func(string) error { b.t.Error("the netns was touched"); return nil }
	b.podCgroup = func(string, string, string) (string, error) { b.t.Error("the cgroup was touched"); return "", nil }
}

// TestAddSkips: who is left alone, and that nothing is touched for it.
func TestAddSkips(t *testing.T) {
	hostNetwork := meshed()
	hostNetwork.HostNetwork = true
	for _, tc := range []struct {
		name, args string
		agent      string
		conf       string
		pod        *redirect.Pod // nil: no facts may be asked for
		rule       string
	}{
		{name: "no Kubernetes", args: "IgnoreUnknown=1", rule: "P2"},
		{name: "no args", args: "", rule: "P2"},
		{name: "no name", args: "K8S_POD_NAMESPACE=ns", rule: "P2"},
		{name: "malformed args", args: ";;=;K8S_POD_NAME;K8S_POD_NAMESPACE=ns", rule: "P2"},
		{name: "excluded", args: "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=p", rule: "P3"},
		{name: "excluded otherwise", args: "K8S_POD_NAMESPACE=b;K8S_POD_NAME=p", conf: `"excludeNamespaces":["a","b"]`, rule: "P3"},
		{name: "the agent", args: "K8S_POD_NAMESPACE=shunt;K8S_POD_NAME=shunt-node-x7k2p", agent: "shunt/shunt-node\n", rule: "P4"},
		{name: "host network", pod: hostNetwork, rule: "P6a"},
		{name: "no proxy", pod: plain(), rule: "P8"},
		{name: "mode NONE", pod: meshed("sidecar.istio.io/interceptionMode", "NONE"), rule: "P14"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			b.untouchable()
			b.pod = tc.pod
			if tc.pod == nil {
				b.args.Args = tc.args
			}
			more := []string{prevOf("1.1.0"), `"logLevel":"info"`, `"kubeconfig":"/none/such"`}
			if tc.conf != "" {
				more = append(more, tc.conf)
			}
			b.args.StdinData = []byte(b.conf("1.1.0", more...))
			b.args.Netns = "/none/such"
			if tc.agent != "" {
				if err := os.WriteFile(filepath.Join(b.runDir, "agent"), []byte(tc.agent), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := b.add(&b.args); err != nil {
				t.Fatal(err)
			}
			if b.out.String() != prevBytes("1.1.0") {
				t.Errorf("printed %s", &b.out)
			}
			if want := "rule=" + tc.rule + " "; !strings.Contains(b.logged.String(), want) {
				t.Errorf("logged %s, want %s", &b.logged, want)
			}
		})
	}
}

// TestAddErrors: code and text, nothing printed, nothing left.
func TestAddErrors(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prepare func(*bed)
		code    uint
		want    string
		undone  bool // by the plugin
	}{
		{"not JSON", func(b *bed) { b.args.StdinData = []byte("{") }, 6, "parse network configuration: decode JSON", false},
		{"unknown key", func(b *bed) { b.args.StdinData = []byte(b.conf("1.1.0", `"logLevl":"x"`)) }, 7, `"logLevl": "x": no such key`, false},
		{"prevResult", func(b *bed) { b.args.StdinData = []byte(b.conf("1.1.0", `"prevResult":{"ips":[{"address":"x"}]}`)) }, 6, `parse prevResult: ips[0].address: "x"`, false},
		{"prevResult of an excluded pod", func(b *bed) {
			b.args.StdinData = []byte(b.conf("1.1.0", `"prevResult":[]`))
			b.args.Args = "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=p"
		}, 6, `parse prevResult: `, false},
		{"no facts", func(b *bed) { b.podErr = errors.New("nobody knows") }, 11, "nobody knows", false},
		{"annotation", func(b *bed) { b.pod = meshed("traffic.sidecar.istio.io/excludeOutboundPorts", "80,,81") }, 7, "traffic.sidecar.istio.io/excludeOutboundPorts: value \"80,,81\"", false},
		{"own annotation", func(b *bed) { b.pod = meshed("shunt.dev/datapath", "bpf") }, 7, `shunt.dev/datapath: value "bpf": expected ebpf or iptables`, false},
		{"not served", func(b *bed) {
			b.pod = meshed("istio.io/reroute-virtual-interfaces", "net1", redirect.KeyDatapath, "ebpf")
		}, 100, "interfaces are rerouted: net1", false},
		{"host's netns", func(b *bed) { b.checkNetns = func(string) error { return errors.New("it is the host's") } }, 8, "program pod ns/p: it is the host's", false},
		{"backend", func(b *bed) { b.backend.applyErr = errors.New("EPERM") }, 100, "program pod ns/p: EPERM", true},
		{"backend, undo", func(b *bed) {
			b.backend.applyErr, b.backend.removeErr = errors.New("EPERM"), errors.New("EBUSY")
		}, 100, "program pod ns/p: EPERM; undo it: EBUSY", true},
		{"print", func(b *bed) { b.stdout = failingWriter{} }, 5, "print the result: closed", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			b.pod = meshed()
			tc.prepare(b)
			if b.podErr != nil {
				b.pod = nil
			}
			b.wantError(b.add(&b.args), tc.code, tc.want)
			if len(b.backend.applied) > 0 {
				t.Errorf("left programmed: %v", b.backend.applied)
			}
			if undone := len(b.backend.removed) > 0; undone != tc.undone {
				t.Errorf("removed %v", b.backend.removed)
			}
		})
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("closed") }

// oneAnswer is a podFactsTimeout in which one answer comes, large as it may be, by
// TLS, under -race and on a machine that is busy.
const oneAnswer = "3s"

// TestAddAPIServer: the plugin with its real sources, and what the API server
// may do to it.
func TestAddAPIServer(t *testing.T) {
	old := meshed()
	old.UID = "old"
	for _, tc := range []struct {
		name   string
		faults []testbed.APIFault
		always *testbed.APIFault
		want   string // of an error of code 11
	}{
		{name: "fine"},
		{name: "404, then there", faults: []testbed.APIFault{{Status: 404}}},
		{name: "an older pod, then the pod", faults: []testbed.APIFault{{Pod: old}, {Pod: old}}},
		{name: "500", always: &testbed.APIFault{Status: 500, Message: "etcd is down"}, want: "500 Internal Server Error: etcd is down"},
		{name: "hanging", always: &testbed.APIFault{Hang: true}, want: "deadline exceeded"},
		{name: "older pod for ever", always: &testbed.APIFault{Pod: old}, want: "has not the uid " + podUID},
		{name: "403", always: &testbed.APIFault{Status: 403, Message: "forbidden"}, want: "403 Forbidden: forbidden (allow "},
		{name: "too big", always: &testbed.APIFault{Body: make([]byte, 8<<20+1)}, want: "larger than"},
		{name: "not JSON", always: &testbed.APIFault{Body: []byte("<html>")}, want: "parse pod"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := testbed.NewAPIServer(t)
			s.SetPod(t, "ns", "p", meshed())
			s.Fail(tc.faults...)
			timeout := "30s"
			if tc.always != nil {
				s.FailAlways(*tc.always)
				timeout = oneAnswer
			}
			b := newBed(t)
			b.facts = realFacts
			b.args.StdinData = []byte(b.conf("1.1.0", prevOf("1.1.0"), `"podFactsTimeout":"`+timeout+`"`,
				`"kubeconfig":"`+s.WriteKubeconfig(t, t.TempDir())+`"`))
			start := time.Now()
			err := b.add(&b.args)
			if tc.want != "" {
				b.wantError(err, 11, tc.want)
				if took := time.Since(start); took > 10*time.Second { // by default it would be 30
					t.Errorf("took %v", took)
				}
			} else if err != nil || len(b.backend.applied) != 1 {
				t.Errorf("error %v, applied %v", err, b.backend.applied)
			}
		})
	}
}

func TestDel(t *testing.T) {
	a := redirect.Attachment{ContainerID: "c1", IfName: "eth0"}
	for _, tc := range []struct {
		name, conf string
		code       uint
		want       string
		removeErr  error
	}{
		{name: "as it was added"},
		{name: "late", conf: `{"cniVersion":"1.1.0","name":"n","type":"shunt-cni"}`},
		{name: "prevResult of any form", conf: `{"type":"shunt-cni","prevResult":"?"}`},
		{name: "a configuration of another release", conf: `{"type":"shunt-cni","newKey":1,"proxy":{"uid":-1}}`},
		{name: "not JSON", conf: `{`, code: 6, want: "decode JSON"},
		{name: "no bpfDir", conf: `{"type":"shunt-cni","bpfDir":"x"}`, code: 7, want: `bpfDir: "x"`},
		{name: "busy", removeErr: errors.New("EBUSY"), code: 100, want: "remove what was programmed for container c1: EBUSY"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			b.backend.applied[a] = redirect.Target{}
			b.backend.removeErr = tc.removeErr
			b.args.Netns, b.args.Args = "", ""
			if tc.conf != "" {
				b.args.StdinData = []byte(tc.conf)
			}
			for range 2 { // a DEL is repeated, and then has nothing to do
				err := b.del(&b.args)
				if tc.code != 0 {
					b.wantError(err, tc.code, tc.want)
				} else if err != nil || len(b.backend.applied) > 0 || b.out.Len() > 0 {
					t.Errorf("error %v, left %v, printed %s", err, b.backend.applied, &b.out)
				}
			}
		})
	}
}

func TestCheck(t *testing.T) {
	a := redirect.Attachment{ContainerID: "c1", IfName: "eth0"}
	for _, tc := range []struct {
		name    string
		prepare func(*bed)
		asked   int // for facts
		code    uint
		want    string
	}{
		{name: "as it should be", prepare: func(b *bed) { b.backend.applied[a] = redirect.Target{} }},
		{name: "cgroup gone", prepare: func(b *bed) {
			b.backend.applied[a] = redirect.Target{}
			b.podCgroup = func(string, string, string) (string, error) { return "", loader.ErrNoPodCgroup }
		}},
		{name: "differs", prepare: func(b *bed) { b.backend.checkErr = errors.New("link connect4 is missing") }, code: 101, want: "check pod ns/p: link connect4 is missing"},
		{name: "left alone", prepare: func(b *bed) { b.pod = plain() }, asked: 1},
		{name: "excluded", prepare: func(b *bed) {
			b.untouchable()
			b.args.Args = "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=p"
		}},
		{name: "lost", prepare: func(b *bed) { b.pod = meshed() }, asked: 1, code: 101, want: "check pod ns/p: it is to be redirected, but nothing is programmed"},
		{name: "unknown", prepare: func(b *bed) { b.podErr = errors.New("nobody knows") }, asked: 1, code: 11, want: "nobody knows"},
		{name: "prevResult", prepare: func(b *bed) { b.args.StdinData = []byte(b.conf("1.1.0", `"prevResult":1`)) }, code: 6, want: "parse prevResult"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			tc.prepare(b)
			err := b.check(&b.args)
			if tc.code != 0 {
				b.wantError(err, tc.code, tc.want)
			} else if err != nil || b.out.Len() > 0 {
				t.Errorf("error %v, printed %s", err, &b.out)
			}
			if b.asked != tc.asked {
				t.Errorf("facts were asked for %d times, want %d", b.asked, tc.asked)
			}
		})
	}
}

// TestCheckIsBrief: CHECK does not wait as long for facts as ADD.
func TestCheckIsBrief(t *testing.T) {
	b := newBed(t)
	facts := b.facts
	b.pod = plain()
	b.facts = func(conf *netconf.Config, log *slog.Logger) FactsSource {
		if conf.PodFactsTimeout != checkFactsTimeout {
			t.Errorf("facts within %v", conf.PodFactsTimeout)
		}
		return facts(conf, log)
	}
	if err := b.check(&b.args); err != nil {
		t.Error(err)
	}
}

func TestGC(t *testing.T) {
	keep, stale := redirect.Attachment{ContainerID: "c1", IfName: "eth0"}, redirect.Attachment{ContainerID: "c2", IfName: "eth0"}
	otherIf := redirect.Attachment{ContainerID: "c1", IfName: "net1"}
	valid := `"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"},{"containerID":"c9","ifname":"eth0"}]`
	for _, tc := range []struct {
		name    string
		conf    string
		prepare func(*bed)
		left    []redirect.Attachment
		code    uint
		want    string
	}{
		{name: "some", conf: valid, left: []redirect.Attachment{keep}},
		{name: "none valid", conf: `"cni.dev/valid-attachments":[]`},
		{name: "not told", conf: `"dns":{}`, left: []redirect.Attachment{keep, stale, otherIf}, code: 7, want: "cni.dev/valid-attachments is missing"},
		{name: "told nonsense", conf: `"cni.dev/valid-attachments":[1]`, left: []redirect.Attachment{keep, stale, otherIf}, code: 7, want: "valid-attachments[0]: 1 is not an object"},
		{name: "can't remove", conf: valid, prepare: func(b *bed) { b.backend.removeErr = errors.New("EBUSY") }, left: []redirect.Attachment{keep, stale, otherIf}, code: 100, want: "for container c2: EBUSY"},
		{name: "can't list", conf: valid, prepare: func(b *bed) { b.backend.listErr = errors.New("EIO") }, left: []redirect.Attachment{keep, stale, otherIf}, code: 100, want: "list what is programmed: EIO"},
		{name: "can't sweep", conf: valid, prepare: func(b *bed) { b.backend.sweepErr = errors.New("EPERM") }, left: []redirect.Attachment{keep}, code: 100, want: "pods that are gone: EPERM"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			for _, a := range []redirect.Attachment{keep, stale, otherIf} {
				b.backend.applied[a] = redirect.Target{}
			}
			if tc.prepare != nil {
				tc.prepare(b)
			}
			b.args = skel.CmdArgs{StdinData: []byte(b.conf("1.1.0", tc.conf))}
			err := b.gc(&b.args)
			if tc.code != 0 {
				b.wantError(err, tc.code, tc.want)
			} else if err != nil || b.out.Len() > 0 {
				t.Errorf("error %v, printed %s", err, &b.out)
			}
			var left []redirect.Attachment
			for a := range b.backend.applied {
				left = append(left, a)
			}
			order := cmpopts.SortSlices(func(a, b redirect.Attachment) bool { return fmt.Sprint(a) < fmt.Sprint(b) })
			if diff := cmp.Diff(tc.left, left, order, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("left (-want +got):\n%s", diff)
			}
		})
	}
}

func TestStatus(t *testing.T) {
	for _, tc := range []struct {
		name    string
		conf    []string
		prepare func(*bed)
		code    uint
		want    string
		said    string // where it does not fail
		logged  string
	}{
		{name: "no kubeconfig", said: "pods get ebpf", logged: "pods of the mesh can't be set up while the node agent does not answer"},
		{name: "configuration", conf: []string{`"x":1`}, code: 7, want: "no such key"},
		{name: "iptables needs no cgroup2", conf: []string{`"datapath":"iptables"`}, prepare: func(b *bed) {
			b.cgroupRoot = func(string) (string, error) { return "", errors.New("cgroup2 is mounted nowhere") }
		}, said: "pods get iptables", logged: "pods of the mesh can't be set up while the node agent does not answer"},
		{name: "no cgroup2", prepare: func(b *bed) {
			b.cgroupRoot = func(string) (string, error) { return "", errors.New("cgroup2 is mounted nowhere") }
		}, said: "pods get iptables (no-cgroup2): cgroup2 is mounted nowhere", logged: "msg=\"pods are redirected by iptables\" command=STATUS reason=no-cgroup2 error=\"cgroup2 is mounted nowhere"},
		{name: "no cgroup2 for ebpf", conf: []string{`"datapath":"ebpf"`}, prepare: func(b *bed) {
			b.cgroupRoot = func(string) (string, error) { return "", errors.New("cgroup2 is mounted nowhere") }
		}, code: 50, want: "cgroup2 is mounted nowhere"},
		{name: "iptables alone", prepare: func(b *bed) {
			b.backend.notEBPF = &redirect.Reason{Name: redirect.ReasonLoadRefused, Text: "too old"}
		}, said: "pods get iptables (load-refused): too old", logged: "command=STATUS reason=load-refused error=\"too old"},
		{name: "neither", prepare: func(b *bed) {
			b.cgroupRoot = func(string) (string, error) { return "", errors.New("cgroup2 is mounted nowhere") }
			b.backend.readyErr = errors.New("no iptables programs")
		}, code: 50, want: "datapath ebpf: cgroup2 is mounted nowhere; datapath iptables: no iptables programs"},
		{name: "backend", prepare: func(b *bed) { b.backend.readyErr = errors.New("no BPF") }, code: 50, want: "no BPF"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			if tc.prepare != nil {
				tc.prepare(b)
			}
			b.args = skel.CmdArgs{StdinData: []byte(b.conf("1.1.0", tc.conf...))}
			err := b.status(&b.args)
			if tc.code != 0 {
				b.wantError(err, tc.code, tc.want)
			} else if err != nil || b.out.Len() > 0 {
				t.Errorf("error %v, printed %s", err, &b.out)
			}
			if !strings.Contains(b.logged.String(), tc.logged) {
				t.Errorf("logged %s, want %s", &b.logged, tc.logged)
			}
			if tc.code == types.ErrInvalidNetworkConfig {
				return // it is not known where the agent is
			}
			// The agent is told the same.
			said, err := answer.Read(b.runDir)
			if err != nil || said == nil || said.Able != (tc.code == 0) || !strings.Contains(said.Text, tc.want+tc.said) || said.Datapath == "" {
				t.Errorf("the agent is told %+v, %v; want %q", said, err, tc.want+tc.said)
			}
		})
	}
}

// TestStatusUntold: that the agent can't be told is no failure of STATUS.
func TestStatusUntold(t *testing.T) {
	b := newBed(t)
	b.runDir += "/none"
	b.args = skel.CmdArgs{StdinData: []byte(b.conf("1.1.0"))}
	if err := b.status(&b.args); err != nil || !strings.Contains(b.logged.String(), "the node agent does not learn of this STATUS") {
		t.Errorf("error %v, logged %s", err, &b.logged)
	}
}

func TestLogLevels(t *testing.T) {
	all := []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError}
	for level, want := range map[string]int{"panic": 0, "fatal": 0, "error": 1, "warn": 2, "info": 3, "debug": 4} {
		log := newLog(io.Discard, io.Discard, level)
		got := len(slices.DeleteFunc(slices.Clone(all), func(l slog.Level) bool { return !log.Enabled(t.Context(), l) }))
		if got != want {
			t.Errorf("%s: %d of %v are logged, want %d", level, got, all, want)
		}
	}
}
