// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// A Pod is what the rules need of a Kubernetes Pod. Its fields carry the names
// and places of the Kubernetes API (core/v1), so that a trimmed Pod marshals
// to JSON that ParsePod reads back.
type Pod struct {
	ObjectMeta `json:"metadata"`
	PodSpec    `json:"spec"`
}

// ObjectMeta is the part of metadata that is needed.
type ObjectMeta struct {
	Namespace   string            `json:"namespace,omitempty"`
	Name        string            `json:"name,omitempty"`
	UID         string            `json:"uid,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// PodSpec is the part of spec that is needed.
type PodSpec struct {
	HostNetwork      bool        `json:"hostNetwork,omitempty"`
	HostUsers        *bool       `json:"hostUsers,omitempty"` // nil means true
	RuntimeClassName string      `json:"runtimeClassName,omitempty"`
	InitContainers   []Container `json:"initContainers,omitempty"`
	Containers       []Container `json:"containers"`
}

// A Container is the needed part of one entry of spec.containers or
// spec.initContainers.
type Container struct {
	Name            string           `json:"name"`
	Args            []string         `json:"args,omitempty"`
	Env             []EnvVar         `json:"env,omitempty"`
	Ports           []ContainerPort  `json:"ports,omitempty"`
	RestartPolicy   string           `json:"restartPolicy,omitempty"` // "Always" makes an init container a sidecar
	SecurityContext *SecurityContext `json:"securityContext,omitempty"`
}

// An EnvVar is an environment variable. Value is empty where the value comes
// from elsewhere (valueFrom): there is nothing to read then.
type EnvVar struct {
	Name  string `json:"name"`
	Value string `json:"value,omitempty"`
}

// A ContainerPort is a port a container says it listens on.
type ContainerPort struct {
	ContainerPort int32  `json:"containerPort"`
	Protocol      string `json:"protocol,omitempty"` // empty means TCP
}

// SecurityContext is the needed part of a container's securityContext.
type SecurityContext struct {
	RunAsUser  *int64 `json:"runAsUser,omitempty"`
	RunAsGroup *int64 `json:"runAsGroup,omitempty"`
}

// ParsePod decodes the JSON of a Kubernetes Pod (core/v1). Unknown fields are
// ignored, and apiVersion and kind may be absent. An object of another kind
// and an object without containers are errors: the rules would take either
// for a pod that has no proxy, and let it go unredirected. Errors have 1 KiB at
// most, in valid UTF-8, whatever data is.
func ParsePod(data []byte) (*Pod, error) {
	var obj struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Pod
	}
	if err := json.Unmarshal(data, &obj); err != nil {
		return nil, fmt.Errorf("parse pod: %w", shortError{err}) // which may quote a number of any length
	}
	if kind := obj.Kind; kind != "" && kind != "Pod" {
		return nil, fmt.Errorf("parse pod: the object is of kind %s, not Pod", clip(kind))
	}
	if v := obj.APIVersion; v != "" && v != "v1" {
		return nil, fmt.Errorf("parse pod: the object is of apiVersion %s, not v1", clip(v))
	}
	if len(obj.Containers) == 0 {
		return nil, errors.New("parse pod: the object has no spec.containers: not a Pod")
	}
	return &obj.Pod, nil
}

// A shortError is one of which no more is said than an error may hold.
type shortError struct{ error }

func (e shortError) Error() string { return shortened(e.error.Error()) }
func (e shortError) Unwrap() error { return e.error }

// shortened cuts a text to what an error may hold of it, as valid UTF-8.
func shortened(s string) string {
	const most = 256
	if len(s) <= most {
		return strings.ToValidUTF8(s, "")
	}
	return strings.ToValidUTF8(s[:most], "") + fmt.Sprintf("... (%d bytes)", len(s))
}

// keyConfigHash is where the kubelet keeps the UID that a static pod has on
// its node; the API server's mirror pod, which keyConfigMirror marks, bears
// another one in metadata.uid.
const (
	keyConfigHash   = "kubernetes.io/config.hash"
	keyConfigMirror = "kubernetes.io/config.mirror"
)

// MatchesUID reports whether uid, as the runtime gave it in K8S_POD_UID, is
// this pod's (semantics P6). An empty uid matches nothing.
func (p *Pod) MatchesUID(uid string) bool {
	return uid != "" && (uid == p.UID || uid == p.Annotations[keyConfigHash])
}

// NodeUID returns the UID by which the node knows the pod: its runtime, and its
// cgroups. A static pod's own is that of its mirror in the API server. The mark
// of a mirror has to be there as well: who may create a pod could else give it
// the UID of another, but no kubelet runs a pod that says it is a mirror.
func (p *Pod) NodeUID() string {
	if hash := p.Annotations[keyConfigHash]; hash != "" && p.Annotations[keyConfigMirror] != "" {
		return hash
	}
	return p.UID
}

// Container returns the container of that name, looking at the containers
// first and at the init containers then (a native sidecar); nil if there is
// none. Kubernetes keeps the names unique over both.
func (p *Pod) Container(name string) *Container {
	for _, list := range [][]Container{p.Containers, p.InitContainers} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// longRunning returns the containers that live as long as the pod: its
// containers, and the init containers with restartPolicy Always.
func (p *Pod) longRunning() []*Container {
	var list []*Container
	for i := range p.Containers {
		list = append(list, &p.Containers[i])
	}
	for i := range p.InitContainers {
		if c := &p.InitContainers[i]; c.RestartPolicy == "Always" {
			list = append(list, c)
		}
	}
	return list
}

// env returns the literal value of a variable, and whether it has one. Of
// several of that name the last counts, as it does in the container. An empty
// value is none: the API can't tell it from valueFrom once it is trimmed.
func (c *Container) env(name string) (string, bool) {
	for i := len(c.Env) - 1; i >= 0; i-- {
		if c.Env[i].Name == name {
			return c.Env[i].Value, c.Env[i].Value != ""
		}
	}
	return "", false
}
