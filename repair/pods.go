// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"

	"shunt.dev/shunt/redirect"
)

// nodeUID is the UID by which the node knows a pod: see redirect.Pod.
func nodeUID(pod *corev1.Pod) string {
	return (&redirect.Pod{ObjectMeta: redirect.ObjectMeta{UID: string(pod.UID), Annotations: pod.Annotations}}).NodeUID()
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
