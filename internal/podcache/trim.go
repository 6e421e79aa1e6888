// SPDX-License-Identifier: Apache-2.0

package podcache

import (
	"maps"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"shunt.dev/shunt/redirect"
)

// keyLastApplied is kubectl's copy of the whole object.
const keyLastApplied = "kubectl.kubernetes.io/last-applied-configuration"

// trim is the informer's transform: it keeps of a pod what the rules and the
// repair controller need, which is a few percent of it. What is no pod (a
// tombstone of one) is left as it is.
func trim(obj any) (any, error) {
	if pod, ok := obj.(*corev1.Pod); ok {
		return trimPod(pod), nil
	}
	return obj, nil
}

// trimPod returns a trimmed copy, which shares maps and slices with pod.
func trimPod(p *corev1.Pod) *corev1.Pod {
	annotations := p.Annotations
	if _, ok := annotations[keyLastApplied]; ok {
		annotations = maps.Clone(annotations)
		delete(annotations, keyLastApplied)
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: p.Name, Namespace: p.Namespace, UID: p.UID, ResourceVersion: p.ResourceVersion,
			Labels: p.Labels, Annotations: annotations, OwnerReferences: p.OwnerReferences,
			DeletionTimestamp: p.DeletionTimestamp,
		},
		Spec: corev1.PodSpec{
			NodeName: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork, HostUsers: p.Spec.HostUsers,
			RuntimeClassName: p.Spec.RuntimeClassName, RestartPolicy: p.Spec.RestartPolicy,
			InitContainers: trimContainers(p.Spec.InitContainers),
			Containers:     trimContainers(p.Spec.Containers),
		},
		Status: corev1.PodStatus{
			Phase: p.Status.Phase, PodIPs: p.Status.PodIPs,
			InitContainerStatuses: trimStatuses(p.Status.InitContainerStatuses),
			ContainerStatuses:     trimStatuses(p.Status.ContainerStatuses),
			// By these repair tells the containers of `kubectl debug` from the sandbox.
			EphemeralContainerStatuses: trimStatuses(p.Status.EphemeralContainerStatuses),
		},
	}
}

func trimContainers(list []corev1.Container) []corev1.Container {
	if list == nil {
		return nil
	}
	out := make([]corev1.Container, len(list))
	for i := range list {
		c := &list[i]
		out[i] = corev1.Container{Name: c.Name, Args: c.Args, Ports: c.Ports, SecurityContext: c.SecurityContext, RestartPolicy: c.RestartPolicy}
		for _, e := range c.Env {
			// Of several of a name the last counts, also one without a value.
			out[i].Env = append(out[i].Env, corev1.EnvVar{Name: e.Name, Value: e.Value})
		}
	}
	return out
}

func trimStatuses(list []corev1.ContainerStatus) []corev1.ContainerStatus {
	if list == nil {
		return nil
	}
	out := make([]corev1.ContainerStatus, len(list))
	for i := range list {
		s := &list[i]
		out[i] = corev1.ContainerStatus{
			Name: s.Name, ContainerID: s.ContainerID, State: s.State, LastTerminationState: s.LastTerminationState,
			Ready: s.Ready, RestartCount: s.RestartCount,
		}
	}
	return out
}

// factsOf is what the plugin is told of a pod.
func factsOf(p *corev1.Pod) *redirect.Pod {
	f := &redirect.Pod{
		ObjectMeta: redirect.ObjectMeta{
			Namespace: p.Namespace, Name: p.Name, UID: string(p.UID), Labels: p.Labels, Annotations: p.Annotations,
		},
		PodSpec: redirect.PodSpec{
			HostNetwork: p.Spec.HostNetwork, HostUsers: p.Spec.HostUsers,
			InitContainers: factsOfContainers(p.Spec.InitContainers),
			Containers:     factsOfContainers(p.Spec.Containers),
		},
	}
	if p.Spec.RuntimeClassName != nil {
		f.RuntimeClassName = *p.Spec.RuntimeClassName
	}
	return f
}

func factsOfContainers(list []corev1.Container) []redirect.Container {
	out := make([]redirect.Container, len(list))
	for i := range list {
		c := &list[i]
		out[i] = redirect.Container{Name: c.Name, Args: c.Args}
		if c.RestartPolicy != nil {
			out[i].RestartPolicy = string(*c.RestartPolicy)
		}
		for _, e := range c.Env {
			out[i].Env = append(out[i].Env, redirect.EnvVar{Name: e.Name, Value: e.Value})
		}
		for _, p := range c.Ports {
			out[i].Ports = append(out[i].Ports, redirect.ContainerPort{ContainerPort: p.ContainerPort, Protocol: string(p.Protocol)})
		}
		if sc := c.SecurityContext; sc != nil {
			out[i].SecurityContext = &redirect.SecurityContext{RunAsUser: sc.RunAsUser, RunAsGroup: sc.RunAsGroup}
		}
	}
	return out
}
