// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"cmp"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// exitMissing is what `shunt validate` and Istio's own validation end with where
// traffic is not redirected.
const exitMissing = 126

// keyStatus is the annotation of pods that the mesh has injected.
const keyStatus = "sidecar.istio.io/status"

// A Filter tells broken pods from others.
type Filter struct {
	Node          string
	InitContainer string // whose exit code counts
}

// Broken reports whether a pod's validation has failed; if not, why it is none
// of ours.
func (f Filter) Broken(pod *corev1.Pod) (broken bool, why string) {
	if why := f.foreign(pod); why != "" {
		return false, why
	}
	there, ended := f.ended(pod)
	switch {
	case !there:
		return false, "init container " + f.InitContainer + " has no status"
	case ended == nil:
		return false, "init container " + f.InitContainer + " has not ended"
	case ended.ExitCode != exitMissing:
		return false, "init container " + f.InitContainer + " ended otherwise"
	}
	return true, ""
}

// ended gives the last end of the init container, if it is there and has one. The
// present counts before the past: one that has passed by now is right, whatever
// came before.
func (f Filter) ended(pod *corev1.Pod) (there bool, end *corev1.ContainerStateTerminated) {
	i := slices.IndexFunc(pod.Status.InitContainerStatuses, func(s corev1.ContainerStatus) bool { return s.Name == f.InitContainer })
	if i < 0 {
		return false, nil
	}
	s := &pod.Status.InitContainerStatuses[i]
	return true, cmp.Or(s.State.Terminated, s.LastTerminationState.Terminated)
}

// Started says when the init container that has ended last was started.
func (f Filter) Started(pod *corev1.Pod) time.Time {
	if _, end := f.ended(pod); end != nil {
		return end.StartedAt.Time
	}
	return time.Time{}
}

// foreign says why a pod is no concern of this node's controller.
func (f Filter) foreign(pod *corev1.Pod) string {
	_, injected := pod.Annotations[keyStatus]
	switch {
	case pod.Spec.NodeName != f.Node:
		return "it is another node's"
	case pod.DeletionTimestamp != nil:
		return "it is being deleted"
	case pod.Spec.HostNetwork:
		return "it has the host's network"
	case !injected:
		return "it was never injected"
	}
	return ""
}

// Running reports whether a container of the pod has been running for at least
// grace. Its network was then set up to the end, for whatever sandbox.
func (f Filter) Running(pod *corev1.Pod, now time.Time, grace time.Duration) bool {
	if f.foreign(pod) != "" || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return false
	}
	for _, list := range [][]corev1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses} {
		for _, s := range list {
			if r := s.State.Running; r != nil && !r.StartedAt.IsZero() && now.Sub(r.StartedAt.Time) >= grace {
				return true
			}
		}
	}
	return false
}

// canRecover reports whether the kubelet starts a failed init container again.
func canRecover(pod *corev1.Pod) bool {
	return pod.Spec.RestartPolicy != corev1.RestartPolicyNever && pod.Status.Phase != corev1.PodFailed
}
