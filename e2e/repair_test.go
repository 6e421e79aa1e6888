// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// validated has the init container that tells a pod which is not redirected.
func validated(p *corev1.Pod) {
	c := container("istio-validation", 1337)
	c.Image, c.Command = thisImage, []string{"/opt/shunt/bin/shunt", "validate"}
	p.Spec.InitContainers = append(p.Spec.InitContainers, c)
}

// The race: pods start before the plugin is on the node, and repair, by the
// rights that the chart gives it, mends, deletes or labels them.
func TestRace(t *testing.T) {
	repair := func(mend, remove, label bool) map[string]any {
		return map[string]any{"repair": map[string]any{"repairPods": mend, "deletePods": remove, "labelPods": label}}
	}
	for _, tt := range []struct {
		name   string
		values map[string]any
		check  func(*testing.T, *corev1.Pod, map[string]string)
	}{
		{"mend", repair(true, true, true), func(t *testing.T, old *corev1.Pod, labels map[string]string) {
			p := awaitLabelled(t, labels, func(p *corev1.Pod) error { return unless(isReady(p), "not ready") })
			if p.UID != old.UID {
				t.Errorf("pod %s is another, %s: expected it mended in place", p.Name, p.UID)
			}
			wantRedirected(t, p)
		}},
		{"delete", repair(false, true, true), func(t *testing.T, old *corev1.Pod, labels map[string]string) {
			p := awaitLabelled(t, labels, func(p *corev1.Pod) error {
				return unless(isReady(p) && p.UID != old.UID, "not a new one that is ready")
			})
			wantRedirected(t, p)
		}},
		{"label", repair(false, false, true), func(t *testing.T, old *corev1.Pod, labels map[string]string) {
			p := awaitLabelled(t, labels, func(p *corev1.Pod) error {
				return unless(p.Labels["cni.istio.io/uninitialized"] == "true", "no label")
			})
			if p.UID != old.UID || isReady(p) {
				t.Errorf("pod %s: %s, ready %v: expected the old one, not ready", p.Name, p.UID, isReady(p))
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			uninstall(t)
			labels := map[string]string{"app": "race-" + tt.name}
			rs := replicaSet(labels["app"], labels, meshed("race", validated))
			if _, err := client.AppsV1().ReplicaSets(space).Create(t.Context(), rs, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { removeSet(t, rs.Name, labels) })
			old := awaitLabelled(t, labels, func(p *corev1.Pod) error {
				for _, c := range p.Status.InitContainerStatuses {
					for _, s := range []*corev1.ContainerStateTerminated{c.State.Terminated, c.LastTerminationState.Terminated} {
						if s != nil && s.ExitCode == 126 {
							return nil
						}
					}
				}
				return errors.New("its validation has not failed")
			})
			began := time.Now()
			install(t, tt.values)
			tt.check(t, old, labels)
			t.Logf("settled %s after the chart was applied", time.Since(began).Round(10*time.Millisecond))
		})
	}
}

func unless(ok bool, what string) error {
	if ok {
		return nil
	}
	return errors.New(what)
}

func replicaSet(name string, labels map[string]string, p *corev1.Pod) *appsv1.ReplicaSet {
	p.Labels = labels
	return &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: space},
		Spec: appsv1.ReplicaSetSpec{
			Replicas: new(int32(1)), Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: p.Annotations}, Spec: p.Spec},
		},
	}
}

func removeSet(t *testing.T, name string, labels map[string]string) {
	ctx := contextOfCleanup()
	if err := client.AppsV1().ReplicaSets(space).Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: new(metav1.DeletePropagationBackground)}); err != nil {
		t.Error(err)
	}
	if err := poll(patience, func() error {
		pods, err := client.CoreV1().Pods(space).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(&metav1.LabelSelector{MatchLabels: labels})})
		if err == nil && len(pods.Items) > 0 {
			err = fmt.Errorf("%d pods left", len(pods.Items))
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// awaitLabelled waits for a pod of these labels that is as it should be.
func awaitLabelled(t *testing.T, labels map[string]string, good func(*corev1.Pod) error) *corev1.Pod {
	t.Helper()
	var found *corev1.Pod
	err := poll(patience, func() error {
		pods, err := client.CoreV1().Pods(space).List(t.Context(), metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(&metav1.LabelSelector{MatchLabels: labels})})
		if err != nil {
			return err
		}
		err = errors.New("no pod")
		for i := range pods.Items {
			found = &pods.Items[i]
			if err = good(found); err == nil {
				return nil
			}
		}
		return err
	})
	if err != nil {
		state := ""
		if found != nil {
			state = podState(found.Name)
		}
		t.Fatalf("a pod of %v: %v\n%s\n%s", labels, err, state, agentState(t))
	}
	return found
}
