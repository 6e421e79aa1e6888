// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const podJSON = `{
  "apiVersion": "v1", "kind": "Pod",
  "metadata": {"namespace": "shop", "name": "cart-1", "uid": "u-1", "managedFields": [{"manager": "x"}],
    "labels": {"app": "cart"}, "annotations": {"sidecar.istio.io/status": "{}"}},
  "spec": {
    "hostUsers": false, "runtimeClassName": "nvidia", "nodeName": "n1",
    "initContainers": [{"name": "istio-proxy", "restartPolicy": "Always", "args": ["proxy", "sidecar"],
      "env": [{"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}, {"name": "A", "value": "b"}],
      "securityContext": {"runAsUser": 1500, "runAsGroup": 0, "privileged": false}}],
    "containers": [{"name": "app", "ports": [{"containerPort": 8080, "protocol": "TCP", "name": "http"}, {"containerPort": 53, "protocol": "UDP"}]}]
  },
  "status": {"phase": "Pending"}
}`

func ptr[T any](v T) *T { return &v }

func TestParsePod(t *testing.T) {
	want := &Pod{
		ObjectMeta: ObjectMeta{
			Namespace: "shop", Name: "cart-1", UID: "u-1",
			Labels:      map[string]string{"app": "cart"},
			Annotations: map[string]string{"sidecar.istio.io/status": "{}"},
		},
		PodSpec: PodSpec{
			HostUsers: ptr(false), RuntimeClassName: "nvidia",
			InitContainers: []Container{{
				Name: "istio-proxy", RestartPolicy: "Always", Args: []string{"proxy", "sidecar"},
				Env:             []EnvVar{{Name: "POD_NAME"}, {Name: "A", Value: "b"}},
				SecurityContext: &SecurityContext{RunAsUser: ptr[int64](1500), RunAsGroup: ptr[int64](0)},
			}},
			Containers: []Container{{
				Name:  "app",
				Ports: []ContainerPort{{ContainerPort: 8080, Protocol: "TCP"}, {ContainerPort: 53, Protocol: "UDP"}},
			}},
		},
	}
	got, err := ParsePod([]byte(podJSON))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ParsePod (-want +got):\n%s", diff)
	}

	trimmed, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParsePod(trimmed)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(got, again); diff != "" {
		t.Errorf("a trimmed pod reads differently (-want +got):\n%s", diff)
	}
}

func TestParsePodErrors(t *testing.T) {
	for _, tc := range []struct{ name, in, want string }{
		{"not JSON", `nope`, "parse pod: invalid character"},
		{"cut short", podJSON[:200], "parse pod: unexpected end of JSON input"},
		{"trailing", podJSON + `{}`, "parse pod: invalid character '{' after top-level value"},
		{"wrong type", `{"spec": {"containers": [{"name": 7}]}}`, "parse pod: json: cannot unmarshal number"},
		{"port too wide", `{"spec": {"containers": [{"ports": [{"containerPort": 4294967296}]}]}}`, "parse pod: json: cannot unmarshal number"},
		{"wrong kind", `{"kind": "Deployment"}`, `parse pod: the object is of kind "Deployment", not Pod`},
		{"an API error", `{"kind": "Status", "apiVersion": "v1", "status": "Failure"}`, `parse pod: the object is of kind "Status", not Pod`},
		{"wrong group", `{"kind": "Pod", "apiVersion": "metrics.k8s.io/v1beta1"}`, `of apiVersion "metrics.k8s.io/v1beta1", not v1`},
		{"null", `null`, "no spec.containers"},
		{"empty", `{}`, "no spec.containers"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod, err := ParsePod([]byte(tc.in))
			if err == nil || pod != nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("ParsePod = %v, %v; want an error with %q", pod, err, tc.want)
			}
		})
	}
}

func TestMatchesUID(t *testing.T) {
	pod := &Pod{ObjectMeta: ObjectMeta{UID: "mirror", Annotations: map[string]string{keyConfigHash: "hash"}}}
	for uid, want := range map[string]bool{"mirror": true, "hash": true, "other": false, "": false} {
		if got := pod.MatchesUID(uid); got != want {
			t.Errorf("MatchesUID(%q) = %v, want %v", uid, got, want)
		}
	}
	if (&Pod{}).MatchesUID("") {
		t.Error("an empty UID matches a pod without one")
	}
}

func TestEnv(t *testing.T) {
	c := &Container{Env: []EnvVar{{"A", "1"}, {"A", "2"}, {"B", "1"}, {"B", ""}}}
	type result struct {
		value string
		ok    bool
	}
	for name, want := range map[string]result{"A": {"2", true}, "B": {"", false}, "C": {"", false}} {
		value, ok := c.env(name)
		if got := (result{value, ok}); got != want {
			t.Errorf("env(%q) = %v, want %v", name, got, want)
		}
	}
}

func FuzzParsePod(f *testing.F) {
	for _, s := range []string{podJSON, `{}`, `null`, `[]`, `{"kind":"Pod","spec":{"containers":[null]}}`, `{"spec":{"containers":[{"env":[{"name":"X","valueFrom":{}}]}]}}`} {
		f.Add([]byte(s))
	}
	c := DefaultConfig()
	f.Fuzz(func(t *testing.T, data []byte) {
		pod, err := ParsePod(data)
		if (pod == nil) == (err == nil) {
			t.Fatalf("ParsePod = %v, %v", pod, err)
		}
		if pod != nil {
			checkEvaluate(t, &c, pod)
		}
	})
}
