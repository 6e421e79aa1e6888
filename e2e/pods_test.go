// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"shunt.dev/shunt/e2e/wire"
)

const (
	space = "default"
	image = "localhost/shunt-e2e/workload:1"

	keyMode     = "sidecar.istio.io/interceptionMode"
	keyDatapath = "shunt.dev/datapath"
)

func container(name string, uid int64, args ...string) corev1.Container {
	return corev1.Container{
		Name: name, Image: image, ImagePullPolicy: corev1.PullNever, Args: args,
		Env:             []corev1.EnvVar{{Name: "POD_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}}},
		SecurityContext: &corev1.SecurityContext{RunAsUser: &uid, RunAsGroup: &uid, AllowPrivilegeEscalation: new(bool)},
	}
}

// containerOf gives a pod's container to change.
func containerOf(p *corev1.Pod, name string) *corev1.Container {
	return &p.Spec.Containers[slices.IndexFunc(p.Spec.Containers, func(c corev1.Container) bool { return c.Name == name })]
}

func httpProbe(port int, path string) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt(port)}},
		PeriodSeconds: 1, TimeoutSeconds: 5, FailureThreshold: 180,
	}
}

// plain is a pod outside of the mesh. Its app dials the sink from its first
// moment on.
func plain(name string, more ...func(*corev1.Pod)) *corev1.Pod {
	app := container("app", 1000, "app", "-early", sinkURL)
	app.Ports = []corev1.ContainerPort{{ContainerPort: wire.AppPort}}
	app.ReadinessProbe = httpProbe(wire.AppPort, "/")
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: space, Labels: map[string]string{"app": name}, Annotations: map[string]string{}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: new(int64(1)), AutomountServiceAccountToken: new(bool), EnableServiceLinks: new(bool),
			Containers: []corev1.Container{app},
		},
	}
	for _, f := range more {
		f(p)
	}
	return p
}

// meshed is a pod as the injector leaves it: its app, the proxy, the
// annotation.
func meshed(name string, more ...func(*corev1.Pod)) *corev1.Pod {
	return plain(name, append([]func(*corev1.Pod){func(p *corev1.Pod) {
		proxy := container("istio-proxy", 1337, "proxy", "sidecar")
		proxy.ReadinessProbe = httpProbe(wire.ProxyPort, "/healthz")
		p.Spec.Containers = append(p.Spec.Containers, proxy)
		p.Annotations["sidecar.istio.io/status"] = "{}"
	}}, more...)...)
}

func annotated(key, value string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Annotations[key] = value }
}

// create creates a pod, and deletes it with the test.
func create(t *testing.T, p *corev1.Pod) {
	t.Helper()
	if _, err := client.CoreV1().Pods(p.Namespace).Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
		t.Fatalf("create pod %s: %v", p.Name, err)
	}
	t.Cleanup(func() { deletePod(t, p.Name) })
}

func deletePod(t *testing.T, name string) {
	t.Helper()
	ctx := context.Background()
	if err := client.CoreV1().Pods(space).Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		t.Errorf("delete pod %s: %v", name, err)
	}
	if err := poll(patience, func() error {
		_, err := client.CoreV1().Pods(space).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("it is there"))
	}); err != nil {
		t.Errorf("delete pod %s: %v", name, err)
	}
}

// awaitReady gives the pod as it is when it is ready.
func awaitReady(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	var p *corev1.Pod
	err := poll(patience, func() (err error) {
		if p, err = client.CoreV1().Pods(space).Get(t.Context(), name, metav1.GetOptions{}); err != nil {
			return err
		}
		if !isReady(p) {
			return fmt.Errorf("phase %s", p.Status.Phase)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("pod %s is not ready: %v\n%s\n%s", name, err, podState(name), agentState(t))
	}
	return p
}

func isReady(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

func podState(name string) string {
	p, err := client.CoreV1().Pods(space).Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		return err.Error()
	}
	status, _ := json.Marshal(p.Status)
	return string(status) + "\n" + fmt.Sprint(eventsOf(name))
}

func eventsOf(name string) (texts []string) {
	events, err := client.CoreV1().Events(space).List(context.Background(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + name})
	if err != nil {
		return []string{err.Error()}
	}
	for _, e := range events.Items {
		texts = append(texts, e.Reason+": "+e.Message)
	}
	return texts
}

// start creates a pod and waits until it is ready.
func start(t *testing.T, p *corev1.Pod) *corev1.Pod {
	t.Helper()
	began := time.Now()
	create(t, p)
	p = awaitReady(t, p.Name)
	t.Logf("pod %s ready after %s", p.Name, time.Since(began).Round(10*time.Millisecond))
	return p
}

// get asks a pod's workload, from the node.
func get(t *testing.T, p *corev1.Pod, port int, path string, into any) {
	t.Helper()
	if err := ask(hostPort(p.Status.PodIP, port), path, into); err != nil {
		t.Fatalf("pod %s: %v", p.Name, err)
	}
}

func ask(addr, path string, into any) error {
	c := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := c.Get("http://" + addr + path)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	return json.NewDecoder(res.Body).Decode(into)
}

func hostPort(ip string, port int) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }

// dialFrom has the pod's app connect.
func dialFrom(t *testing.T, p *corev1.Pod, to string) (d wire.Dial) {
	t.Helper()
	get(t, p, wire.ControlPort, "/dial?url="+url.QueryEscape("http://"+to+"/"), &d)
	return d
}

// wantOut checks that the app's connection came to the proxy, which was told
// where it was to go.
func wantOut(t *testing.T, p *corev1.Pod, to string) {
	t.Helper()
	d := dialFrom(t, p, to)
	if d.Answer.Who != "proxy" || d.Answer.OriginalDst != to || d.Peer != to || d.Answer.Peer != d.Local {
		t.Errorf("%s -> %s: got %+v: expected the proxy's answer, with the original destination and the app's own address", p.Name, to, d)
	}
}

// wantIn checks that a connection from the node to the app came by its proxy,
// which stands before the app under the address that its mode asks for.
func wantIn(t *testing.T, p *corev1.Pod, ip string) {
	t.Helper()
	to := hostPort(ip, wire.AppPort)
	var a wire.Answer
	if err := ask(to, "/", &a); err != nil {
		t.Errorf("%s: %v", to, err)
		return
	}
	source := map[bool]string{true: "127.0.0.6", false: "::6"}[net.ParseIP(ip).To4() != nil]
	if p.Annotations[keyMode] == "TPROXY" {
		source = ownAddress(t, to)
	}
	host, _, _ := net.SplitHostPort(a.Peer)
	if a.Who != "app" || host != source {
		t.Errorf("%s: got %+v: expected the app's answer to its proxy, %s", to, a, source)
	}
	var in []wire.Inbound
	get(t, p, wire.ProxyPort, "/inbound", &in)
	if !slices.ContainsFunc(in, func(i wire.Inbound) bool { return i.OriginalDst == to && i.Error == "" }) {
		t.Errorf("%s: the proxy knows of %+v: expected an original destination %s", p.Name, in, to)
	}
}

// ownAddress is what the node has towards a pod.
func ownAddress(t *testing.T, to string) string {
	t.Helper()
	c, err := net.Dial("udp", to) // sends nothing
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	host, _, _ := net.SplitHostPort(c.LocalAddr().String())
	return host
}

// wantRedirected checks both directions and both families.
func wantRedirected(t *testing.T, p *corev1.Pod) {
	t.Helper()
	wantOut(t, p, "10.99.0.1:80")
	wantOut(t, p, "[2001:db8::1]:80")
	if len(p.Status.PodIPs) != 2 {
		t.Errorf("pod %s has the addresses %v: expected two", p.Name, p.Status.PodIPs)
	}
	for _, ip := range p.Status.PodIPs {
		wantIn(t, p, ip.IP)
	}
	wantNotAround(t, p)
	datapath := p.Annotations[keyDatapath]
	if datapath == "" {
		datapath = "ebpf"
	}
	wantDatapath(t, p, datapath)
}

// wantDatapath checks what the pod is redirected by.
func wantDatapath(t *testing.T, p *corev1.Pod, datapath string) {
	t.Helper()
	got := records(sandbox(t, p))
	if !maps.Equal(got, map[string]int{datapath: 1}) {
		t.Errorf("pod %s is redirected by %v: expected %s\n%s", p.Name, got, datapath, agentState(t))
	}
}

// records counts those of a sandbox by their datapath.
func records(sandbox string) map[string]int {
	found := map[string]int{}
	for datapath, dir := range map[string]string{"ebpf": "attachments", "iptables": "iptables"} {
		if names, _ := filepath.Glob("/run/shunt/" + dir + "/" + sandbox + "@*.json"); len(names) > 0 {
			found[datapath] = len(names)
		}
	}
	return found
}

// wantGone deletes a pod, of which nothing is left.
func wantGone(t *testing.T, p *corev1.Pod) {
	t.Helper()
	id := sandbox(t, p)
	deletePod(t, p.Name)
	eventually(t, patience, "nothing is left of pod "+p.Name, func() error {
		if left := records(id); len(left) > 0 {
			return fmt.Errorf("records: %v", left)
		}
		return nil
	})
}

// wantNotAround checks that not one connection of the pod, from its first
// moment on, went around the proxy.
func wantNotAround(t *testing.T, p *corev1.Pod) {
	t.Helper()
	if e := awaitEarly(t, p); len(e.Around) > 0 {
		t.Errorf("pod %s: %d of %d connections went around the proxy: %+v", p.Name, len(e.Around), e.Answered, e.Around[0])
	}
	if n := sink.by(p.Status.PodIP); n > 0 {
		t.Errorf("pod %s has reached the sink %d times", p.Name, n)
	}
}

// awaitEarly waits until the pod's app has got an answer to what it dials from
// its first moment on.
func awaitEarly(t *testing.T, p *corev1.Pod) (e wire.Early) {
	t.Helper()
	eventually(t, patience, "the app of "+p.Name+" has got an answer", func() error {
		if err := ask(hostPort(p.Status.PodIP, wire.ControlPort), "/early", &e); err != nil {
			return err
		}
		if e.Answered == 0 {
			return fmt.Errorf("%d tries, no answer", e.Tried)
		}
		return nil
	})
	return e
}

// traces lists what Shunt keeps of pods on the node.
func traces() (found []string) {
	for _, pattern := range []string{
		"/sys/fs/bpf/shunt/cgroups/*", "/sys/fs/bpf/shunt/netns/*",
		"/run/shunt/attachments/*", "/run/shunt/users/*", "/run/shunt/iptables/*.json",
	} {
		names, _ := filepath.Glob(pattern)
		found = append(found, names...)
	}
	return found
}

func wantNoTraces(t *testing.T) {
	t.Helper()
	eventually(t, patience, "nothing is left of the pods", func() error {
		if left := traces(); len(left) > 0 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
}

func wantFile(t *testing.T, name string, want []byte) {
	t.Helper()
	eventually(t, patience, name+" is as it was", func() error {
		got, err := os.ReadFile(name)
		if err == nil && string(got) != string(want) {
			err = fmt.Errorf("got %s: expected %s", got, want)
		}
		return err
	})
}
