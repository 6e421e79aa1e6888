// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"encoding/json"
	"fmt"
	"strconv"
)

// KubePod is a Pod object of Kubernetes, as far as tests shape it. Its JSON is
// what the API server would give.
type KubePod struct {
	APIVersion string     `json:"apiVersion"`
	Kind       string     `json:"kind"`
	Metadata   KubeMeta   `json:"metadata"`
	Spec       KubeSpec   `json:"spec"`
	Status     KubeStatus `json:"status"`
}

// KubeMeta is a pod's metadata.
type KubeMeta struct {
	Name            string            `json:"name"`
	Namespace       string            `json:"namespace"`
	UID             string            `json:"uid"`
	ResourceVersion string            `json:"resourceVersion"`
	Labels          map[string]string `json:"labels,omitempty"`
	Annotations     map[string]string `json:"annotations,omitempty"`
}

// KubeSpec is a pod's spec.
type KubeSpec struct {
	NodeName         string          `json:"nodeName,omitempty"`
	HostNetwork      bool            `json:"hostNetwork,omitempty"`
	HostUsers        *bool           `json:"hostUsers,omitempty"`
	RuntimeClassName string          `json:"runtimeClassName,omitempty"`
	SecurityContext  *KubeSecurity   `json:"securityContext,omitempty"`
	InitContainers   []KubeContainer `json:"initContainers,omitempty"`
	Containers       []KubeContainer `json:"containers"`
}

// KubeContainer is a container or an init container.
type KubeContainer struct {
	Name            string        `json:"name"`
	Image           string        `json:"image"`
	Args            []string      `json:"args,omitempty"`
	Env             []KubeEnv     `json:"env,omitempty"`
	Ports           []KubePort    `json:"ports,omitempty"`
	RestartPolicy   string        `json:"restartPolicy,omitempty"`
	SecurityContext *KubeSecurity `json:"securityContext,omitempty"`
}

// KubeEnv is a variable of a container's environment.
type KubeEnv struct {
	Name  string `json:"name"`
	Value string `json:"value,omitempty"`
}

// KubePort is a port that a container declares.
type KubePort struct {
	Name          string `json:"name,omitempty"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol,omitempty"`
}

// KubeSecurity is a security context.
type KubeSecurity struct {
	RunAsUser  *int64 `json:"runAsUser,omitempty"`
	RunAsGroup *int64 `json:"runAsGroup,omitempty"`
}

// KubeStatus is a pod's status.
type KubeStatus struct {
	Phase string `json:"phase,omitempty"`
}

// Container gives a pointer to a container or init container, or nil.
func (k *KubePod) Container(name string) *KubeContainer {
	for _, list := range [][]KubeContainer{k.Spec.Containers, k.Spec.InitContainers} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// PodMutator changes a pod before it is written.
type PodMutator func(*KubePod)

// Annotate sets an annotation.
func Annotate(key, value string) PodMutator {
	return func(k *KubePod) { k.Metadata.Annotations[key] = value }
}

// Unannotate takes an annotation away.
func Unannotate(key string) PodMutator {
	return func(k *KubePod) { delete(k.Metadata.Annotations, key) }
}

// Label sets a label.
func Label(key, value string) PodMutator {
	return func(k *KubePod) { k.Metadata.Labels[key] = value }
}

// ContainerPorts sets the TCP ports that the app's container declares.
func ContainerPorts(ports ...uint16) PodMutator {
	return func(k *KubePod) {
		app := k.Container("app")
		app.Ports = nil
		for _, p := range ports {
			app.Ports = append(app.Ports, KubePort{ContainerPort: int(p), Protocol: "TCP"})
		}
	}
}

// ProxyIDs sets runAsUser and runAsGroup of the proxy's container.
func ProxyIDs(uid, gid int64) PodMutator {
	return func(k *KubePod) {
		k.Container("istio-proxy").SecurityContext = &KubeSecurity{RunAsUser: &uid, RunAsGroup: &gid}
	}
}

// ProxyEnv sets a variable of the proxy's environment.
func ProxyEnv(name, value string) PodMutator {
	return func(k *KubePod) {
		c := k.Container("istio-proxy")
		c.Env = append(c.Env, KubeEnv{Name: name, Value: value})
	}
}

// HostUsers sets hostUsers.
func HostUsers(on bool) PodMutator { return func(k *KubePod) { k.Spec.HostUsers = &on } }

// Injected gives the pod as Kubernetes knows it: with an app that declares port
// 8080 and a sidecar proxy that the mesh has injected. It may be given to
// [APIServer.SetPod].
func (p *Pod) Injected(mutators ...PodMutator) json.RawMessage {
	k := p.KubePod()
	for _, m := range mutators {
		m(k)
	}
	b, err := json.Marshal(k)
	if err != nil {
		panic(fmt.Sprintf("testbed: a pod of plain strings and numbers doesn't marshal: %v", err))
	}
	return b
}

// KubePod is what Injected writes, before any mutator.
func (p *Pod) KubePod() *KubePod {
	uid, gid := int64(ProxyUID), int64(ProxyGID)
	return &KubePod{
		APIVersion: "v1",
		Kind:       "Pod",
		Metadata: KubeMeta{
			Name: p.Name, Namespace: p.Namespace, UID: p.UID, ResourceVersion: "1",
			Labels: map[string]string{
				"app":                       p.Name,
				"security.istio.io/tlsMode": "istio",
			},
			Annotations: map[string]string{
				"sidecar.istio.io/status": `{"initContainers":["istio-validation"],"containers":["istio-proxy"],"volumes":["istio-envoy"],"revision":"default"}`,
			},
		},
		Spec: KubeSpec{
			NodeName:       "node-1",
			InitContainers: []KubeContainer{{Name: "istio-validation", Image: "proxy:test"}},
			Containers: []KubeContainer{
				{
					Name: "app", Image: "app:test",
					Ports: []KubePort{{Name: "http", ContainerPort: 8080, Protocol: "TCP"}},
				},
				{
					Name: "istio-proxy", Image: "proxy:test",
					Args: []string{"proxy", "sidecar", "--domain", p.Namespace + ".svc.cluster.local"},
					Env: []KubeEnv{
						{Name: "ISTIO_META_INTERCEPTION_MODE", Value: "REDIRECT"},
						{Name: "PROXY_OUTBOUND_PORT", Value: strconv.Itoa(OutboundPort)},
					},
					Ports:           []KubePort{{Name: "http-envoy-prom", ContainerPort: 15090, Protocol: "TCP"}},
					SecurityContext: &KubeSecurity{RunAsUser: &uid, RunAsGroup: &gid},
				},
			},
		},
		Status: KubeStatus{Phase: "Pending"},
	}
}
