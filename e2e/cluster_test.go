// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

const (
	system    = "kube-system"
	daemonSet = "shunt-node"
	confDir   = "/etc/cni/net.d"
	chainFile = confDir + "/10-pods.conflist"
)

// patience is for what has to come and, on a machine that others use too, may
// take its time.
const patience = 3 * time.Minute

// poll asks until done says so, and gives its last error when it never does.
func poll(timeout time.Duration, done func() error) error {
	deadline := time.Now().Add(timeout)
	for {
		err := done()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func eventually(t *testing.T, timeout time.Duration, what string, done func() error) {
	t.Helper()
	start := time.Now()
	if err := poll(timeout, done); err != nil {
		t.Fatalf("%s: not within %s: %v", what, timeout, err)
	}
	if d := time.Since(start); d > time.Second {
		t.Logf("%s: after %s", what, d.Round(10*time.Millisecond))
	}
}

// ready waits for what comes a moment after the daemons: the node, and what
// pods need of the controllers.
func ready() error {
	ctx := context.Background()
	start := time.Now()
	err := poll(patience, func() error {
		n, err := client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(n.Spec.Taints) > 0 {
			return fmt.Errorf("node has taints %v", n.Spec.Taints)
		}
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
				return fmt.Errorf("node is not ready: %s", c.Message)
			}
		}
		_, err = client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	fmt.Printf("e2e: node %s (%s) ready after %s more\n", node, mode, time.Since(start).Round(time.Millisecond))
	return err
}

// render gives the objects of the chart.
func render(t *testing.T, values map[string]any) []runtime.Object {
	t.Helper()
	request, err := json.Marshal(map[string]any{"release": "shunt", "namespace": system, "values": values})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(cache, "helm"), "render", filepath.Join(root, "install/chart"))
	cmd.Stdin, cmd.Stderr = bytes.NewReader(request), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("render the chart: %v", err)
	}
	var answer struct{ Manifest, Notes, Error string }
	if err := json.Unmarshal(out, &answer); err != nil || answer.Error != "" {
		t.Fatalf("render the chart: %v %s", err, answer.Error)
	}
	var objects []runtime.Object
	docs := yaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(answer.Manifest)))
	for {
		buf := make([]byte, len(answer.Manifest)+1)
		n, err := docs.Read(buf)
		if errors.Is(err, io.EOF) {
			return objects
		} else if err != nil {
			t.Fatal(err)
		}
		o, _, err := scheme.Codecs.UniversalDeserializer().Decode(buf[:n], nil, nil)
		if err != nil {
			t.Fatalf("decode %s: %v", buf[:n], err)
		}
		objects = append(objects, o)
	}
}

// apply creates an object, or replaces it.
func apply(t *testing.T, o runtime.Object) {
	t.Helper()
	ctx := t.Context()
	var err error
	switch o := o.(type) {
	case *corev1.ServiceAccount:
		_, err = client.CoreV1().ServiceAccounts(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *corev1.ConfigMap:
		if _, err = client.CoreV1().ConfigMaps(o.Namespace).Create(ctx, o, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
			_, err = client.CoreV1().ConfigMaps(o.Namespace).Update(ctx, o, metav1.UpdateOptions{})
		}
	case *corev1.ResourceQuota:
		_, err = client.CoreV1().ResourceQuotas(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *rbacv1.ClusterRole:
		if _, err = client.RbacV1().ClusterRoles().Create(ctx, o, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
			_, err = client.RbacV1().ClusterRoles().Update(ctx, o, metav1.UpdateOptions{})
		}
	case *rbacv1.ClusterRoleBinding:
		_, err = client.RbacV1().ClusterRoleBindings().Create(ctx, o, metav1.CreateOptions{})
	case *rbacv1.Role:
		if _, err = client.RbacV1().Roles(o.Namespace).Create(ctx, o, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
			_, err = client.RbacV1().Roles(o.Namespace).Update(ctx, o, metav1.UpdateOptions{})
		}
	case *rbacv1.RoleBinding:
		_, err = client.RbacV1().RoleBindings(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
	case *appsv1.DaemonSet:
		if _, err = client.AppsV1().DaemonSets(o.Namespace).Create(ctx, o, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
			_, err = client.AppsV1().DaemonSets(o.Namespace).Update(ctx, o, metav1.UpdateOptions{})
		}
	default:
		t.Fatalf("the chart has a %T, and these tests don't know how to create one", o)
	}
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatalf("create %T: %v", o, err)
	}
}

// remove deletes what the chart has made, the DaemonSet first, as a cluster
// without finalizers would see it.
func remove(t *testing.T, objects []runtime.Object) {
	t.Helper()
	ctx := context.Background()
	now := metav1.DeleteOptions{PropagationPolicy: new(metav1.DeletePropagationBackground)}
	if err := client.AppsV1().DaemonSets(system).Delete(ctx, daemonSet, now); err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	eventually(t, patience, "the agent's pod is gone", func() error {
		pods, err := client.CoreV1().Pods(system).List(ctx, metav1.ListOptions{})
		if err == nil && len(pods.Items) > 0 {
			err = fmt.Errorf("%d pods left", len(pods.Items))
		}
		return err
	})
	for _, o := range objects {
		var err error
		switch o := o.(type) {
		case *corev1.ServiceAccount:
			err = client.CoreV1().ServiceAccounts(o.Namespace).Delete(ctx, o.Name, now)
		case *corev1.ConfigMap:
			err = client.CoreV1().ConfigMaps(o.Namespace).Delete(ctx, o.Name, now)
		case *rbacv1.ClusterRole:
			err = client.RbacV1().ClusterRoles().Delete(ctx, o.Name, now)
		case *rbacv1.ClusterRoleBinding:
			err = client.RbacV1().ClusterRoleBindings().Delete(ctx, o.Name, now)
		case *rbacv1.Role:
			err = client.RbacV1().Roles(o.Namespace).Delete(ctx, o.Name, now)
		case *rbacv1.RoleBinding:
			err = client.RbacV1().RoleBindings(o.Namespace).Delete(ctx, o.Name, now)
		}
		if err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	}
}

// installed is what the node has now, by the chart's values; nil without.
var installed struct {
	values  string
	objects []runtime.Object
}

// install brings Shunt onto the node by its chart, unless it is there.
func install(t *testing.T, values map[string]any) {
	t.Helper()
	key, err := json.Marshal(values)
	if err != nil {
		t.Fatal(err)
	}
	if installed.values == string(key) {
		return
	}
	uninstall(t)
	start := time.Now()
	objects := render(t, values)
	for _, o := range objects {
		apply(t, o)
	}
	installed.values, installed.objects = string(key), objects
	rolledOut(t)
	t.Logf("installed in %s", time.Since(start).Round(10*time.Millisecond))
}

func uninstall(t *testing.T) {
	t.Helper()
	if installed.values == "" {
		return
	}
	awaitCollected(t)
	remove(t, installed.objects)
	installed.values, installed.objects = "", nil
}

// rolledOut waits until the DaemonSet's newest pods are ready.
func rolledOut(t *testing.T) {
	t.Helper()
	err := poll(patience, func() error {
		ds, err := client.AppsV1().DaemonSets(system).Get(t.Context(), daemonSet, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if s := ds.Status; s.ObservedGeneration != ds.Generation || s.UpdatedNumberScheduled != 1 || s.NumberReady != 1 || s.NumberUnavailable != 0 {
			return fmt.Errorf("generation %d of %d, %d updated, %d ready, %d unavailable",
				s.ObservedGeneration, ds.Generation, s.UpdatedNumberScheduled, s.NumberReady, s.NumberUnavailable)
		}
		pods, err := client.CoreV1().Pods(system).List(t.Context(), metav1.ListOptions{})
		if err == nil && len(pods.Items) != 1 {
			err = fmt.Errorf("%d pods", len(pods.Items))
		}
		return err
	})
	if err != nil {
		t.Fatalf("the agent is not ready: %v\n%s", err, agentState(t))
	}
}

// agentState is what the node's agent has to say.
func agentState(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	pods, err := client.CoreV1().Pods(system).List(context.Background(), metav1.ListOptions{})
	if err != nil {
		return err.Error()
	}
	for _, p := range pods.Items {
		fmt.Fprintf(&b, "pod %s: %s\n", p.Name, p.Status.Phase)
		for _, c := range p.Status.ContainerStatuses {
			state, _ := json.Marshal(c.State)
			last, _ := json.Marshal(c.LastTerminationState)
			fmt.Fprintf(&b, "  %s: ready=%v restarts=%d %s last %s\n", c.Name, c.Ready, c.RestartCount, state, last)
		}
	}
	events, err := client.CoreV1().Events(system).List(context.Background(), metav1.ListOptions{})
	if err == nil {
		for _, e := range events.Items {
			fmt.Fprintf(&b, "event %s %s: %s\n", e.InvolvedObject.Name, e.Reason, e.Message)
		}
	}
	logs, _ := filepath.Glob("/run/k8s/podlogs/" + system + "_*/*/*.log")
	for _, name := range logs {
		data, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		fmt.Fprintf(&b, "%s:\n  %s\n", name, strings.Join(lines[max(0, len(lines)-30):], "\n  "))
	}
	return b.String()
}

// daemon starts and stops the node's own.
type daemon string

func (d daemon) pid(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile("/run/k8s/" + string(d) + ".pid")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// kill ends it as a crash does, and waits until it has ended.
func (d daemon) kill(t *testing.T) {
	t.Helper()
	pid := d.pid(t)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatalf("kill %s: %v", d, err)
	}
	eventually(t, patience, string(d)+" has ended", func() error {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || bytes.Contains(stat, []byte(") Z ")) {
			return nil
		}
		return errors.New("it runs")
	})
}

func (d daemon) start(t *testing.T) {
	t.Helper()
	if out, err := exec.Command(filepath.Join(root, "e2e/node/node.sh"), "start", string(d)).CombinedOutput(); err != nil {
		t.Fatalf("start %s: %v: %s", d, err, out)
	}
}

// contextOfCleanup outlives the test.
func contextOfCleanup() context.Context { return context.Background() }
