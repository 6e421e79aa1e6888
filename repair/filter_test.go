// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const testNode = "node-1"

var testFilter = Filter{Node: testNode, InitContainer: "istio-validation"}

func ended(code int32) corev1.ContainerState {
	return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code, Reason: "Error"}}
}

var (
	waiting = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
	running = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(time.Now().Add(-time.Hour))}}
)

// broken is a pod that was started before the plugin was there, changed by edits.
func broken(name string, edits ...func(*corev1.Pod)) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: name, UID: types.UID("uid-" + name),
			Annotations: map[string]string{keyStatus: "{}"}, Labels: map[string]string{"app": "shop"},
		},
		Spec: corev1.PodSpec{
			NodeName: testNode, RestartPolicy: corev1.RestartPolicyAlways,
			InitContainers: []corev1.Container{{Name: "istio-validation"}},
			Containers:     []corev1.Container{{Name: "app"}, {Name: "istio-proxy"}},
		},
		Status: corev1.PodStatus{
			Phase:                 corev1.PodPending,
			InitContainerStatuses: []corev1.ContainerStatus{{Name: "istio-validation", State: waiting, LastTerminationState: ended(126), RestartCount: 2}},
		},
	}
	for _, e := range edits {
		e(pod)
	}
	return pod
}

// up is a pod that runs.
func up(name string, edits ...func(*corev1.Pod)) *corev1.Pod {
	return broken(name, append([]func(*corev1.Pod){func(p *corev1.Pod) {
		p.Status.Phase = corev1.PodRunning
		p.Status.InitContainerStatuses[0] = corev1.ContainerStatus{Name: "istio-validation", State: ended(0)}
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", State: running}, {Name: "istio-proxy", State: running}}
	}}, edits...)...)
}

func never(p *corev1.Pod) {
	p.Spec.RestartPolicy, p.Status.Phase = corev1.RestartPolicyNever, corev1.PodFailed
	p.Status.InitContainerStatuses[0].State, p.Status.InitContainerStatuses[0].LastTerminationState = ended(126), corev1.ContainerState{}
}

func TestBroken(t *testing.T) {
	first := func(p *corev1.Pod) *corev1.ContainerStatus { return &p.Status.InitContainerStatuses[0] }
	states := func(now, last corev1.ContainerState) func(*corev1.Pod) {
		return func(p *corev1.Pod) { first(p).State, first(p).LastTerminationState = now, last }
	}
	none := corev1.ContainerState{}
	for _, tc := range []struct {
		name string
		edit func(*corev1.Pod)
		why  string // empty: it is broken
	}{
		{"waiting to be started again", func(*corev1.Pod) {}, ""},
		{"just ended", states(ended(126), none), ""},
		{"just ended again", states(ended(126), ended(126)), ""},
		{"started again", states(running, ended(126)), ""},
		{"restartPolicy Never", never, ""},
		{"restartPolicy OnFailure", func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyOnFailure }, ""},
		{"labelled", func(p *corev1.Pod) { p.Labels["cni.istio.io/uninitialized"] = "true" }, ""},
		{"a static pod", func(p *corev1.Pod) { p.Annotations["kubernetes.io/config.hash"] = "0123" }, ""},
		{"the annotation is empty", func(p *corev1.Pod) { p.Annotations[keyStatus] = "" }, ""},
		{"not the first init container", func(p *corev1.Pod) {
			p.Status.InitContainerStatuses = append([]corev1.ContainerStatus{{Name: "other", State: ended(0)}}, p.Status.InitContainerStatuses...)
		}, ""},

		{"passed", states(ended(0), none), "ended otherwise"},
		{"passed at last", states(ended(0), ended(126)), "ended otherwise"},
		{"passed, and is to run again", states(waiting, ended(0)), "ended otherwise"},
		{"another exit code", states(waiting, ended(1)), "ended otherwise"},
		{"killed since", states(ended(137), ended(126)), "ended otherwise"},
		{"never started", states(waiting, none), "has not ended"},
		{"running for the first time", states(running, none), "has not ended"},
		{"no state", states(none, none), "has not ended"},
		{"no status", func(p *corev1.Pod) { p.Status.InitContainerStatuses = nil }, "has no status"},
		{"another init container", func(p *corev1.Pod) { first(p).Name = "setup" }, "has no status"},
		{"an app's container of that name", func(p *corev1.Pod) {
			p.Status.ContainerStatuses, p.Status.InitContainerStatuses = p.Status.InitContainerStatuses, nil
		}, "has no status"},
		{"another node's", func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }, "another node"},
		{"no node's", func(p *corev1.Pod) { p.Spec.NodeName = "" }, "another node"},
		{"being deleted", func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{} }, "being deleted"},
		{"the host's network", func(p *corev1.Pod) { p.Spec.HostNetwork = true }, "host's network"},
		{"not injected", func(p *corev1.Pod) { p.Annotations = nil }, "never injected"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, why := testFilter.Broken(broken("x", tc.edit))
			if got != (tc.why == "") || !strings.Contains(why, tc.why) || got && why != "" {
				t.Errorf("got %v, %q; want %q", got, why, tc.why)
			}
		})
	}
}

func TestRunning(t *testing.T) {
	fresh := corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(time.Now().Add(-time.Second))}}
	for _, tc := range []struct {
		name string
		pod  *corev1.Pod
		want bool
	}{
		{"runs", up("x"), true},
		{"an init container runs", broken("x", func(p *corev1.Pod) { p.Status.InitContainerStatuses[0].State = running }), true},
		{"just started", up("x", func(p *corev1.Pod) {
			for i := range p.Status.ContainerStatuses {
				p.Status.ContainerStatuses[i].State = fresh
			}
		}), false},
		{"nothing runs", broken("x"), false},
		{"being deleted", up("x", func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{} }), false},
		{"failed", up("x", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }), false},
		{"another node's", up("x", func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }), false},
	} {
		if got := testFilter.Running(tc.pod, time.Now(), 30*time.Second); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

func TestInterfaceOf(t *testing.T) {
	for annotation, want := range map[string]string{
		"": "eth0", "other": "eth0", "shunt-cni": "net1", "a, kube-system/shunt-cni": "net2", "shunt-cni@mesh0": "mesh0",
		`[{"name":"a"},{"name":"shunt-cni","namespace":"x"}]`: "net2", `[{"name":"shunt-cni","interface":"m1"}]`: "m1", `[{`: "eth0",
	} {
		if got := interfaceOf(broken("x", func(p *corev1.Pod) { p.Annotations[keyNetworks] = annotation })); got != want {
			t.Errorf("%q: %s, want %s", annotation, got, want)
		}
	}
}
