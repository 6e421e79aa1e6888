// SPDX-License-Identifier: Apache-2.0

package charttest

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"sigs.k8s.io/yaml"
)

const (
	chartDir     = "../../install/chart"
	manifestsDir = "../../install/manifests"
)

var update = flag.Bool("update", false, "write what is compared with")

// values are what an operator gives by --values or --set.
type values = map[string]any

// request and answer are those of tools/helm.
type request struct {
	Release     string `json:"release"`
	Namespace   string `json:"namespace"`
	KubeVersion string `json:"kubeVersion"`
	Values      values `json:"values"`
}

type answer struct {
	Manifest string `json:"manifest"`
	Notes    string `json:"notes"`
	Error    string `json:"error"`
}

// helm is the program of tools/helm, one process of which renders for all tests.
type helm struct {
	mu   sync.Mutex
	path string
	in   io.WriteCloser
	out  *json.Decoder
	err  bytes.Buffer
	cmd  *exec.Cmd
	dir  string
}

var engine = sync.OnceValues(func() (*helm, error) {
	dir, err := os.MkdirTemp("", "shunt-charttest-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for Helm: %w", err)
	}
	h := &helm{dir: dir, path: filepath.Join(dir, "helm")}
	build := exec.Command("go", "build", "-trimpath", "-o", h.path, ".")
	build.Dir = "../../tools/helm"
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, errors.Join(fmt.Errorf("build tools/helm: %w\n%s", err, out), os.RemoveAll(dir))
	}
	h.cmd = exec.Command(h.path, "render", chartDir)
	h.cmd.Stderr = &h.err
	if h.in, err = h.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	h.out = json.NewDecoder(out)
	return h, h.cmd.Start()
})

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if h, err := engine(); err == nil {
		_ = h.in.Close()
		if err := h.cmd.Wait(); err != nil {
			fmt.Fprintln(os.Stderr, "end of tools/helm:", err, h.err.String())
			code = 1
		}
		_ = os.RemoveAll(h.dir)
	}
	os.Exit(code)
}

func newHelm(t *testing.T) *helm {
	t.Helper()
	h, err := engine()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// ask renders, or gives Helm's reason not to.
func ask(t *testing.T, req request) answer {
	t.Helper()
	h := newHelm(t)
	h.mu.Lock()
	defer h.mu.Unlock()
	if req.Release == "" {
		req.Release = "shunt"
	}
	if req.Namespace == "" {
		req.Namespace = "kube-system"
	}
	if err := json.NewEncoder(h.in).Encode(req); err != nil {
		t.Fatalf("ask for a rendering: %v", err)
	}
	var a answer
	if err := h.out.Decode(&a); err != nil {
		t.Fatalf("read a rendering: %v", err)
	}
	return a
}

// render renders for a release "shunt" in kube-system.
func render(t *testing.T, v values) answer {
	t.Helper()
	a := ask(t, request{Values: v})
	if a.Error != "" {
		t.Fatalf("render with %v: %s", v, a.Error)
	}
	return a
}

// objects are what a rendering consists of.
type objects struct {
	all []metav1.Object

	DaemonSet           *appsv1.DaemonSet
	ConfigMap           *corev1.ConfigMap
	ServiceAccount      *corev1.ServiceAccount
	ResourceQuota       *corev1.ResourceQuota
	Roles               map[string]*rbacv1.Role
	ClusterRoles        map[string]*rbacv1.ClusterRole
	RoleBindings        map[string]*rbacv1.RoleBinding
	ClusterRoleBindings map[string]*rbacv1.ClusterRoleBinding
	Constraints         *securityContextConstraints
	Network             *networkAttachmentDefinition
	Monitor             *podMonitor
	Rules               *prometheusRule
	Dashboard           *corev1.ConfigMap
}

// podMonitor and prometheusRule are as much as the chart uses of the types of
// Prometheus' operator.
type podMonitor struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Selector            metav1.LabelSelector `json:"selector"`
		PodMetricsEndpoints []struct {
			Port        string       `json:"port"`
			Relabelings []relabeling `json:"relabelings"`
		} `json:"podMetricsEndpoints"`
	} `json:"spec"`
}

type prometheusRule struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              ruleGroups `json:"spec"`
}

// securityContextConstraints is as much as the chart uses of OpenShift's type,
// which has its fields at the top.
type securityContextConstraints struct {
	metav1.TypeMeta          `json:",inline"`
	metav1.ObjectMeta        `json:"metadata"`
	AllowHostDirVolumePlugin bool                `json:"allowHostDirVolumePlugin"`
	AllowHostIPC             bool                `json:"allowHostIPC"`
	AllowHostNetwork         bool                `json:"allowHostNetwork"`
	AllowHostPID             bool                `json:"allowHostPID"`
	AllowHostPorts           bool                `json:"allowHostPorts"`
	AllowPrivilegeEscalation *bool               `json:"allowPrivilegeEscalation"`
	AllowPrivilegedContainer bool                `json:"allowPrivilegedContainer"`
	AllowedCapabilities      []corev1.Capability `json:"allowedCapabilities"`
	DefaultAddCapabilities   []corev1.Capability `json:"defaultAddCapabilities"`
	RequiredDropCapabilities []corev1.Capability `json:"requiredDropCapabilities"`
	FSGroup                  strategy            `json:"fsGroup"`
	RunAsUser                strategy            `json:"runAsUser"`
	SELinuxContext           strategy            `json:"seLinuxContext"`
	SupplementalGroups       strategy            `json:"supplementalGroups"`
	ReadOnlyRootFilesystem   bool                `json:"readOnlyRootFilesystem"`
	SeccompProfiles          []string            `json:"seccompProfiles"`
	Volumes                  []string            `json:"volumes"`
	Groups                   []string            `json:"groups"`
	Users                    []string            `json:"users"`
	Priority                 *int32              `json:"priority"`
}

type strategy struct {
	Type string `json:"type"`
}

// networkAttachmentDefinition is that of the Network Plumbing Working Group.
type networkAttachmentDefinition struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Config string `json:"config"`
	} `json:"spec"`
}

// decoder decodes strictly: what the type doesn't have is an error.
var decoder = sync.OnceValue(func() runtime.Decoder {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, rbacv1.AddToScheme} {
		if err := add(scheme); err != nil {
			panic(err)
		}
	}
	return serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
})

// decode takes a rendering apart.
func decode(t *testing.T, manifest string) *objects {
	t.Helper()
	o, err := parse(manifest)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func parse(manifest string) (*objects, error) {
	o := &objects{
		Roles:               map[string]*rbacv1.Role{},
		ClusterRoles:        map[string]*rbacv1.ClusterRole{},
		RoleBindings:        map[string]*rbacv1.RoleBinding{},
		ClusterRoleBindings: map[string]*rbacv1.ClusterRoleBinding{},
	}
	for doc := range strings.SplitSeq("\n"+manifest, "\n---\n") {
		var meta metav1.TypeMeta
		if err := yaml.Unmarshal([]byte(doc), &meta); err != nil {
			return nil, fmt.Errorf("parse as YAML: %w\n%s", err, doc)
		}
		if meta.Kind == "" {
			continue
		}
		if err := o.add(meta, doc); err != nil {
			return nil, fmt.Errorf("%s: %w\n%s", meta.Kind, err, doc)
		}
	}
	return o, nil
}

func (o *objects) add(meta metav1.TypeMeta, doc string) error {
	var object metav1.Object
	switch meta.APIVersion {
	case "security.openshift.io/v1":
		o.Constraints = new(securityContextConstraints)
		object = o.Constraints
	case "k8s.cni.cncf.io/v1":
		o.Network = new(networkAttachmentDefinition)
		object = o.Network
	case "monitoring.coreos.com/v1":
		if meta.Kind == "PodMonitor" {
			o.Monitor = new(podMonitor)
			object = o.Monitor
		} else {
			o.Rules = new(prometheusRule)
			object = o.Rules
		}
	}
	if object != nil {
		o.all = append(o.all, object)
		return yaml.UnmarshalStrict([]byte(doc), object)
	}
	decoded, _, err := decoder().Decode([]byte(doc), nil, nil)
	if err != nil {
		return err
	}
	object, ok := decoded.(metav1.Object)
	if !ok {
		return fmt.Errorf("%T is not an object", decoded)
	}
	o.all = append(o.all, object)
	switch x := decoded.(type) {
	case *appsv1.DaemonSet:
		o.DaemonSet = x
	case *corev1.ConfigMap:
		if strings.HasSuffix(x.Name, "-dashboard") {
			o.Dashboard = x
		} else {
			o.ConfigMap = x
		}
	case *corev1.ServiceAccount:
		o.ServiceAccount = x
	case *corev1.ResourceQuota:
		o.ResourceQuota = x
	case *rbacv1.Role:
		o.Roles[x.Name] = x
	case *rbacv1.ClusterRole:
		o.ClusterRoles[x.Name] = x
	case *rbacv1.RoleBinding:
		o.RoleBindings[x.Name] = x
	case *rbacv1.ClusterRoleBinding:
		o.ClusterRoleBindings[x.Name] = x
	default:
		return fmt.Errorf("the chart has no need of a %T", x)
	}
	return nil
}

func (o *objects) container(name string) *corev1.Container {
	for i, c := range o.DaemonSet.Spec.Template.Spec.Containers {
		if c.Name == name {
			return &o.DaemonSet.Spec.Template.Spec.Containers[i]
		}
	}
	return nil
}

// set puts a value at a path with dots.
func set(v values, path string, value any) values {
	key, rest, deeper := strings.Cut(path, ".")
	if !deeper {
		v[key] = value
		return v
	}
	sub, ok := v[key].(values)
	if !ok {
		sub = values{}
	}
	v[key] = set(sub, rest, value)
	return v
}
