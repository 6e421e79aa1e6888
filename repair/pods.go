// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"

	"shunt.dev/shunt/redirect"
)

// keyConfigHash is where the kubelet keeps the UID that a static pod has on its
// node.
const keyConfigHash = "kubernetes.io/config.hash"

// nodeUID is the UID by which the node knows a pod: its runtime and its cgroups.
func nodeUID(pod *corev1.Pod) string {
	if hash := pod.Annotations[keyConfigHash]; hash != "" {
		return hash
	}
	return string(pod.UID)
}

// factsOf gives what the rules need of a pod.
func factsOf(pod *corev1.Pod) (*redirect.Pod, error) {
	data, err := json.Marshal(pod)
	if err != nil {
		return nil, fmt.Errorf("read pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return redirect.ParsePod(data)
}

func nameOf(pod *corev1.Pod) string { return pod.Namespace + "/" + pod.Name }
