// SPDX-License-Identifier: Apache-2.0

package charttest

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
)

// platforms are those of the schema; the empty one is the default.
var platforms = []string{"", "gke", "openshift", "k3s", "microk8s", "minikube", "kind"}

// namespaces a platform's pods are put into, where it is not kube-system.
func on(platform string) values { return values{"platform": platform} }

// TestManifests compares install/manifests with a fresh rendering. kind has
// none: it is as the default.
func TestManifests(t *testing.T) {
	want := []string{}
	for _, platform := range platforms {
		file, set := "shunt.yaml", ""
		switch platform {
		case "":
		case "kind":
			if render(t, on(platform)).Manifest != render(t, nil).Manifest {
				t.Error("kind is no longer as the default: give it a manifest")
			}
			continue
		default:
			file, set = "shunt-"+platform+".yaml", " --set platform="+platform
		}
		want = append(want, file)
		header := "# SPDX-License-Identifier: Apache-2.0\n#\n" +
			"# Rendered from install/chart, by `make manifests`; do not edit. It is the output of\n" +
			"#\n#   helm template shunt install/chart --namespace kube-system" + set + "\n"
		golden(t, filepath.Join(manifestsDir, file), []byte(header+render(t, on(platform)).Manifest))
	}
	entries, err := os.ReadDir(manifestsDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains(want, e.Name()) {
			t.Errorf("%s is rendered from nothing", e.Name())
		}
	}
}

func TestLint(t *testing.T) {
	if out, err := exec.Command(newHelm(t).path, "lint", chartDir).CombinedOutput(); err != nil {
		t.Errorf("helm lint --strict: %v\n%s", err, out)
	}
	// That it finds anything at all.
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(chartDir)); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(dir, "templates", "configmap.yaml")
	if err := os.WriteFile(broken, []byte("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: UPPER}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(newHelm(t).path, "lint", dir).CombinedOutput(); err == nil {
		t.Errorf("helm lint takes a name in upper case\n%s", out)
	}
}

// cases are every rendering that other tests look at.
func cases() map[string]request {
	all := map[string]request{
		"elsewhere": {Namespace: "mesh", Release: "other"},
		"v1.25":     {KubeVersion: "v1.25.0"},
		"gke-mesh":  {Namespace: "mesh", Values: on("gke")},
	}
	for _, p := range platforms {
		all["platform="+p] = request{Values: on(p)}
	}
	for _, o := range options {
		all[o.name] = request{Values: o.values}
	}
	for mode, r := range repairModes {
		all[mode] = request{Values: values{"repair": r}}
	}
	return all
}

// TestObjects decodes every rendering strictly, into the types of the API, and
// looks at what has to fit together.
func TestObjects(t *testing.T) {
	for name, req := range cases() {
		t.Run(name, func(t *testing.T) {
			a := ask(t, req)
			if a.Error != "" {
				t.Fatal(a.Error)
			}
			o := decode(t, a.Manifest)
			if req.Namespace == "" {
				req.Namespace = "kube-system"
			}
			checkNames(t, o, req.Namespace)
			checkPods(t, o)
			checkSecurity(t, o)
		})
	}
}

func checkNames(t *testing.T, o *objects, namespace string) {
	t.Helper()
	if o.DaemonSet == nil || o.ConfigMap == nil || o.ServiceAccount == nil {
		t.Fatal("DaemonSet, ConfigMap or ServiceAccount is missing")
	}
	seen := map[string]bool{}
	for _, object := range o.all {
		if id := fmt.Sprintf("%T %s", object, object.GetName()); seen[id] {
			t.Errorf("%s is there twice", id)
		} else {
			seen[id] = true
		}
		want := namespace
		switch object.(type) {
		case *rbacv1.ClusterRole, *rbacv1.ClusterRoleBinding, *securityContextConstraints:
			want = ""
		case *networkAttachmentDefinition:
			want = "default" // where pods of any namespace may name it
		}
		if object.GetNamespace() != want {
			t.Errorf("%T %s is in namespace %q, not %q", object, object.GetName(), object.GetNamespace(), want)
		}
		labels := object.GetLabels()
		if labels["app.kubernetes.io/name"] != "shunt" || labels["app.kubernetes.io/component"] != "node" || labels["app.kubernetes.io/instance"] == "" {
			t.Errorf("%T %s has labels %v", object, object.GetName(), labels)
		}
	}
	account := o.ServiceAccount.Name
	if got := o.DaemonSet.Spec.Template.Spec.ServiceAccountName; got != account {
		t.Errorf("the pods' account is %q, not %q", got, account)
	}
	bind := func(name string, ref rbacv1.RoleRef, subjects []rbacv1.Subject) {
		want := []rbacv1.Subject{{Kind: "ServiceAccount", Name: account, Namespace: namespace}}
		if diff := cmp.Diff(want, subjects); diff != "" {
			t.Errorf("subjects of binding %s (-want +got):\n%s", name, diff)
		}
		_, role := o.Roles[ref.Name]
		_, clusterRole := o.ClusterRoles[ref.Name]
		if ref.Kind == "Role" && !role || ref.Kind == "ClusterRole" && !clusterRole && !strings.HasSuffix(name, "-psp") {
			t.Errorf("binding %s is to %s %s, which is not there", name, ref.Kind, ref.Name)
		}
	}
	for name, b := range o.RoleBindings {
		bind(name, b.RoleRef, b.Subjects)
	}
	for name, b := range o.ClusterRoleBindings {
		bind(name, b.RoleRef, b.Subjects)
	}
	if len(o.ClusterRoles) != len(o.ClusterRoleBindings) {
		t.Error("a ClusterRole is bound to nobody")
	}
}

func checkPods(t *testing.T, o *objects) {
	t.Helper()
	spec := &o.DaemonSet.Spec
	pod := &spec.Template.Spec
	if len(spec.Selector.MatchLabels) == 0 {
		t.Error("the selector is empty")
	}
	for key, value := range spec.Selector.MatchLabels {
		if spec.Template.Labels[key] != value {
			t.Errorf("the pods' label %s is %q, the selector wants %q", key, spec.Template.Labels[key], value)
		}
	}
	if spec.Selector.MatchLabels["app.kubernetes.io/version"] != "" || spec.Selector.MatchLabels["app.kubernetes.io/instance"] != "" {
		t.Error("the selector, which can't be changed, has what changes")
	}
	if got := spec.Template.Labels["sidecar.istio.io/inject"]; got != "false" {
		t.Errorf("label sidecar.istio.io/inject is %q", got)
	}
	if len(pod.Tolerations) == 0 {
		t.Error("no tolerations")
	}
	if pod.NodeSelector["kubernetes.io/os"] != "linux" {
		t.Errorf("nodeSelector %v takes other systems than Linux", pod.NodeSelector)
	}
	if pod.TerminationGracePeriodSeconds == nil || spec.UpdateStrategy.Type == "" {
		t.Error("terminationGracePeriodSeconds or updateStrategy is not set")
	}

	volumes, used := map[string]bool{}, map[string]bool{}
	for _, v := range pod.Volumes {
		if volumes[v.Name] {
			t.Errorf("volume %s is there twice", v.Name)
		}
		volumes[v.Name] = true
		if v.ConfigMap != nil && v.ConfigMap.Name != o.ConfigMap.Name {
			t.Errorf("volume %s is of a ConfigMap %q", v.Name, v.ConfigMap.Name)
		}
	}
	ports := map[int32]bool{}
	for _, c := range pod.Containers {
		if c.Image == "" || c.ImagePullPolicy == "" || len(c.Command) != 0 {
			t.Errorf("container %s: image %q, pull policy %q, command %q", c.Name, c.Image, c.ImagePullPolicy, c.Command)
		}
		at := map[string]bool{}
		for _, m := range c.VolumeMounts {
			if !volumes[m.Name] {
				t.Errorf("container %s mounts %s, which is no volume", c.Name, m.Name)
			}
			used[m.Name] = true
			if at[m.MountPath] {
				t.Errorf("container %s has two mounts at %s", c.Name, m.MountPath)
			}
			at[m.MountPath] = true
		}
		named := map[string]bool{}
		for _, p := range c.Ports {
			if ports[p.ContainerPort] || len(p.Name) > 15 {
				t.Errorf("port %s %d: taken, or its name is too long", p.Name, p.ContainerPort)
			}
			ports[p.ContainerPort], named[p.Name] = true, true
			if !slices.ContainsFunc(c.Args, func(a string) bool { return strings.HasSuffix(a, fmt.Sprintf("-address=:%d", p.ContainerPort)) }) {
				t.Errorf("container %s listens at no port %d: %q", c.Name, p.ContainerPort, c.Args)
			}
		}
		for what, probe := range map[string]*corev1.Probe{"/healthz": c.LivenessProbe, "/readyz": c.ReadinessProbe} {
			if probe == nil || probe.HTTPGet == nil || probe.HTTPGet.Path != what || !named[probe.HTTPGet.Port.StrVal] {
				t.Errorf("container %s: probe of %s is %v", c.Name, what, probe)
			}
		}
		env := map[string]string{}
		for _, e := range c.Env {
			if e.ValueFrom == nil || e.ValueFrom.FieldRef == nil {
				t.Errorf("container %s: %s is not of the downward API", c.Name, e.Name)
				continue
			}
			env[e.Name] = e.ValueFrom.FieldRef.FieldPath
		}
		if diff := cmp.Diff(map[string]string{"POD_NAMESPACE": "metadata.namespace", "NODE_NAME": "spec.nodeName"}, env); diff != "" {
			t.Errorf("container %s: environment (-want +got):\n%s", c.Name, diff)
		}
	}
	if diff := cmp.Diff(volumes, used); diff != "" {
		t.Errorf("volumes and mounts (-volumes +mounts):\n%s", diff)
	}
	// The paths that the plugin's configuration has are the same in the containers.
	conf := netconfOf(t, o)
	for _, c := range pod.Containers {
		if c.Name == "repair" && !pod.HostPID {
			continue
		}
		for _, path := range []string{conf.RunDir, conf.BPFDir} {
			if !slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool {
				return (path == m.MountPath || strings.HasPrefix(path, m.MountPath+"/")) && hostPath(pod, m.Name) == m.MountPath
			}) {
				t.Errorf("container %s doesn't see the host's %s", c.Name, path)
			}
		}
	}
}

func hostPath(pod *corev1.PodSpec, volume string) string {
	for _, v := range pod.Volumes {
		if v.Name == volume && v.HostPath != nil {
			return v.HostPath.Path
		}
	}
	return ""
}

// checkSecurity holds what is said of the containers' rights.
func checkSecurity(t *testing.T, o *objects) {
	t.Helper()
	pod := &o.DaemonSet.Spec.Template.Spec
	if pod.HostIPC || pod.ShareProcessNamespace != nil || len(pod.InitContainers) != 0 {
		t.Error("hostIPC, a shared process namespace, or init containers")
	}
	repair := o.container("repair")
	mends := repair != nil && slices.Contains(repair.Args, "--repair-pods=true")
	if pod.HostPID != mends {
		t.Errorf("hostPID is %v, and pods are mended: %v", pod.HostPID, mends)
	}
	needs := map[string][]corev1.Capability{"agent": {"BPF", "NET_ADMIN", "PERFMON"}, "repair": nil}
	if mends {
		needs["repair"] = []corev1.Capability{"DAC_READ_SEARCH", "NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE"}
	}
	for _, c := range pod.Containers {
		sc := c.SecurityContext
		if sc == nil || sc.Capabilities == nil {
			t.Fatalf("container %s has no security context", c.Name)
		}
		if sc.Privileged == nil || *sc.Privileged || sc.AllowPrivilegeEscalation == nil || *sc.AllowPrivilegeEscalation ||
			sc.ReadOnlyRootFilesystem == nil || !*sc.ReadOnlyRootFilesystem || sc.RunAsUser == nil || *sc.RunAsUser != 0 {
			t.Errorf("container %s: security context %v", c.Name, sc)
		}
		if diff := cmp.Diff([]corev1.Capability{"ALL"}, sc.Capabilities.Drop); diff != "" {
			t.Errorf("container %s drops (-want +got):\n%s", c.Name, diff)
		}
		added := slices.DeleteFunc(slices.Clone(sc.Capabilities.Add), func(c corev1.Capability) bool { return c == "DAC_OVERRIDE" }) // of a case
		if diff := cmp.Diff(needs[c.Name], added, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("container %s adds (-want +got):\n%s", c.Name, diff)
		}
	}
	if repair != nil && !mends && len(repair.VolumeMounts) != 1 {
		t.Errorf("repair mends nothing, and mounts %v", repair.VolumeMounts)
	}
	agent := o.container("agent")
	for _, m := range agent.VolumeMounts {
		if m.Name == "cri" || m.Name == "netns" || m.Name == "cgroup" {
			t.Errorf("the agent mounts %s", m.Name)
		}
	}
	if s := o.Constraints; s != nil {
		var all []corev1.Capability
		for _, c := range pod.Containers {
			all = append(all, c.SecurityContext.Capabilities.Add...)
		}
		slices.Sort(all)
		if diff := cmp.Diff(slices.Compact(all), s.AllowedCapabilities); diff != "" {
			t.Errorf("capabilities that the constraints allow (-pods +constraints):\n%s", diff)
		}
		if s.AllowHostPID != pod.HostPID || s.AllowHostNetwork != pod.HostNetwork || s.AllowPrivilegedContainer || !s.ReadOnlyRootFilesystem || !s.AllowHostDirVolumePlugin {
			t.Errorf("constraints %+v", s)
		}
	}
}

// TestDefaultPod has what is not an option, and the defaults that matter most.
func TestDefaultPod(t *testing.T) {
	o := decode(t, render(t, nil).Manifest)
	pod := o.DaemonSet.Spec.Template.Spec
	if pod.HostNetwork || pod.PriorityClassName != "system-node-critical" {
		t.Errorf("hostNetwork %v, priority class %q", pod.HostNetwork, pod.PriorityClassName)
	}
	if diff := cmp.Diff([]corev1.Toleration{{Operator: corev1.TolerationOpExists}}, pod.Tolerations); diff != "" {
		t.Errorf("tolerations (-want +got):\n%s", diff)
	}
	sc := pod.SecurityContext
	if sc.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || sc.AppArmorProfile.Type != corev1.AppArmorProfileTypeUnconfined || sc.SELinuxOptions != nil {
		t.Errorf("security context of the pod: %v", sc)
	}
	wantPaths := map[string]string{
		"netconf": "", "cni-bin": "/opt/cni/bin", "cni-conf": "/etc/cni/net.d", "run": "/run/shunt", "bpffs": "/sys/fs/bpf",
		"cni-cache": "/var/lib/cni", "cgroup": "/sys/fs/cgroup", "netns": "/run/netns", "cri": "/run/containerd",
	}
	gotPaths := map[string]string{}
	for _, v := range pod.Volumes {
		gotPaths[v.Name] = hostPath(&pod, v.Name)
	}
	if diff := cmp.Diff(wantPaths, gotPaths); diff != "" {
		t.Errorf("the host's paths (-want +got):\n%s", diff)
	}
	annotations := map[string]string{"prometheus.io/scrape": "true", "prometheus.io/port": "15014", "prometheus.io/path": "/metrics"}
	if diff := cmp.Diff(annotations, o.DaemonSet.Spec.Template.Annotations); diff != "" {
		t.Errorf("annotations (-want +got):\n%s", diff)
	}
	for _, c := range pod.Containers {
		for _, m := range c.VolumeMounts {
			propagates := m.MountPropagation != nil && *m.MountPropagation == corev1.MountPropagationHostToContainer
			if want := m.Name == "bpffs" || m.Name == "cgroup" || m.Name == "netns"; propagates != want {
				t.Errorf("container %s, mount %s: HostToContainer is %v", c.Name, m.Name, propagates)
			}
			if want := m.Name == "netconf" || m.Name == "cni-cache" || m.Name == "cgroup" || m.Name == "netns" || m.Name == "cri"; m.ReadOnly != want {
				t.Errorf("container %s, mount %s: read-only is %v", c.Name, m.Name, m.ReadOnly)
			}
		}
	}
}

// TestPlatforms has the values that the platforms' own documentation names.
func TestPlatforms(t *testing.T) {
	type facts struct {
		Bin, Conf, File, CRI, Netns, Seccomp, SELinux string
		Chained, Constraints, Network, Quota          bool
	}
	usual := facts{
		Bin: "/opt/cni/bin", Conf: "/etc/cni/net.d", CRI: "/run/containerd/containerd.sock", Netns: "/run/netns",
		Seccomp: "RuntimeDefault", Chained: true,
	}
	want := map[string]facts{"": usual, "kind": usual}
	with := func(platform string, change func(*facts)) {
		f := usual
		change(&f)
		want[platform] = f
	}
	with("gke", func(f *facts) { f.Bin = "/home/kubernetes/bin" })
	with("openshift", func(f *facts) {
		*f = facts{
			Bin: "/var/lib/cni/bin", Conf: "/etc/cni/multus/net.d", File: "shunt-cni.conf", CRI: "/run/crio/crio.sock", Netns: "/run/netns",
			Seccomp: "Unconfined", SELinux: "spc_t", Constraints: true, Network: true,
		}
	})
	with("k3s", func(f *facts) {
		f.Bin, f.Conf = "/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/agent/etc/cni/net.d"
		f.CRI = "/run/k3s/containerd/containerd.sock"
	})
	with("microk8s", func(f *facts) {
		f.Bin, f.Conf = "/var/snap/microk8s/current/opt/cni/bin", "/var/snap/microk8s/current/args/cni-network"
		f.CRI = "/var/snap/microk8s/common/run/containerd.sock"
	})
	with("minikube", func(f *facts) { f.CRI, f.Netns = "/run/cri-dockerd.sock", "/run/docker/netns" })

	look := func(v values, namespace string) facts {
		a := ask(t, request{Values: v, Namespace: namespace})
		if a.Error != "" {
			t.Fatal(a.Error)
		}
		o := decode(t, a.Manifest)
		pod := o.DaemonSet.Spec.Template.Spec
		f := facts{
			Bin: hostPath(&pod, "cni-bin"), Conf: hostPath(&pod, "cni-conf"), File: arg(o.container("agent"), "cni-conf-file-name"),
			Chained: arg(o.container("agent"), "chained") == "true",
			CRI:     hostPath(&pod, "cri") + "/" + filepath.Base(arg(o.container("repair"), "cri-socket")), Netns: hostPath(&pod, "netns"),
			Seccomp:     string(pod.SecurityContext.SeccompProfile.Type),
			Constraints: o.Constraints != nil, Network: o.Network != nil, Quota: o.ResourceQuota != nil,
		}
		if s := pod.SecurityContext.SELinuxOptions; s != nil {
			f.SELinux = s.Type
		}
		if o.Network != nil && (o.Network.Name != netconfOf(t, o).Name || o.Network.Spec.Config != "") {
			t.Errorf("Multus finds the configuration by its name: the network is %q, the configuration %q", o.Network.Name, netconfOf(t, o).Name)
		}
		return f
	}
	for _, p := range platforms {
		if diff := cmp.Diff(want[p], look(on(p), "kube-system")); diff != "" {
			t.Errorf("platform %q (-want +got):\n%s", p, diff)
		}
	}
	outside := want["gke"]
	outside.Quota = true
	if diff := cmp.Diff(outside, look(on("gke"), "mesh")); diff != "" {
		t.Errorf("gke, outside of kube-system (-want +got):\n%s", diff)
	}
	// What the operator sets goes before the platform's.
	set := facts{
		Bin: "/b", Conf: "/c", File: "x.conf", CRI: "/s/s.sock", Netns: "/n", Seccomp: "RuntimeDefault", SELinux: "container_t",
		Chained: true, Constraints: true, Network: true, Quota: true,
	}
	v := values{
		"platform": "openshift", "cniBinDir": "/b", "cniConfDir": "/c", "cniConfFileName": "x.conf", "chained": true,
		"seccompProfile": values{"type": "RuntimeDefault"}, "seLinuxOptions": values{"type": "container_t"},
		"repair": values{"criSocket": "/s/s.sock", "netnsDir": "/n"}, "resourceQuota": values{"enabled": true},
	}
	a := ask(t, request{Values: v})
	if o := decode(t, a.Manifest); o.Network != nil && netconfOf(t, o).Name != "" {
		t.Errorf("an entry of a chain has the name %q", netconfOf(t, o).Name)
	} else {
		set.Network = o.Network != nil
	}
	if set.Network {
		t.Error("a chained plugin has no need of a network for Multus")
	}
	if diff := cmp.Diff(set, look(v, "kube-system")); diff != "" {
		t.Errorf("the operator's values (-want +got):\n%s", diff)
	}
	no := look(values{"platform": "gke", "resourceQuota": values{"enabled": false}}, "mesh")
	if no.Quota {
		t.Error("resourceQuota.enabled=false makes a quota")
	}
}

// arg gives the value of a flag of a container.
func arg(c *corev1.Container, name string) string {
	for _, a := range c.Args {
		if value, ok := strings.CutPrefix(a, "--"+name+"="); ok {
			return value
		}
	}
	return ""
}

// repairModes are the values of repair that differ in what they need.
var repairModes = map[string]values{
	"repair: off":           {"enabled": false},
	"repair: all":           {},
	"repair: mend only":     {"deletePods": false, "labelPods": false},
	"repair: mend or label": {"deletePods": false},
	"repair: delete":        {"repairPods": false},
	"repair: evict":         {"repairPods": false, "respectDisruptionBudgets": true},
	"repair: label":         {"repairPods": false, "deletePods": false},
	"repair: count":         {"repairPods": false, "deletePods": false, "labelPods": false},
}

// TestRBAC has every right there is, by what repair is to do.
func TestRBAC(t *testing.T) {
	rule := func(group, resource string, verbs ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{group}, Resources: []string{resource}, Verbs: verbs}
	}
	events := rule("", "events", "create")
	want := map[string][]rbacv1.PolicyRule{
		"repair: off":           nil,
		"repair: all":           {events, rule("", "pods", "delete")},
		"repair: mend only":     {events},
		"repair: mend or label": {events, rule("", "pods", "patch")},
		"repair: delete":        {events, rule("", "pods", "delete")},
		"repair: evict":         {events, rule("", "pods/eviction", "create")},
		"repair: label":         {events, rule("", "pods", "patch")},
		"repair: count":         {events},
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(repairModes))); diff != "" {
		t.Fatalf("modes (-want +got):\n%s", diff)
	}
	for mode, r := range repairModes {
		t.Run(mode, func(t *testing.T) {
			o := decode(t, render(t, values{"repair": r}).Manifest)
			wantRoles := map[string][]rbacv1.PolicyRule{"shunt-node": {rule("", "pods", "get", "list", "watch"), rule("", "nodes", "get")}}
			if mode != "repair: off" {
				wantRoles["shunt-node-repair"] = want[mode]
			}
			got := map[string][]rbacv1.PolicyRule{}
			for name, r := range o.ClusterRoles {
				got[name] = r.Rules
			}
			if diff := cmp.Diff(wantRoles, got); diff != "" {
				t.Errorf("rights in the whole cluster (-want +got):\n%s", diff)
			}
			own := rule("apps", "daemonsets", "get", "list", "watch")
			own.ResourceNames = []string{o.DaemonSet.Name}
			token := rule("", "serviceaccounts/token", "create")
			token.ResourceNames = []string{o.DaemonSet.Spec.Template.Spec.ServiceAccountName}
			if diff := cmp.Diff([]rbacv1.PolicyRule{own, token}, o.Roles["shunt-node"].Rules); diff != "" || len(o.Roles) != 1 {
				t.Errorf("rights in the namespace (-want +got):\n%s", diff)
			}
		})
	}
	o := decode(t, render(t, on("openshift")).Manifest)
	use := rule("security.openshift.io", "securitycontextconstraints", "use")
	use.ResourceNames = []string{o.Constraints.Name}
	if rules := o.Roles["shunt-node"].Rules; len(rules) != 3 || !cmp.Equal(rules[2], use) {
		t.Errorf("openshift: rights in the namespace: %v", rules)
	}
	o = decode(t, render(t, values{"psp_cluster_role": "psp"}).Manifest)
	if ref := o.RoleBindings["shunt-node-psp"].RoleRef; ref != (rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "psp"}) {
		t.Errorf("psp_cluster_role is bound by %v", ref)
	}
}

// TestOldKubernetes: the field for AppArmor is there since 1.30; before that it
// is an annotation.
func TestOldKubernetes(t *testing.T) {
	const prefix = "container.apparmor.security.beta.kubernetes.io/"
	a := ask(t, request{KubeVersion: "v1.29.9-gke.100"})
	o := decode(t, a.Manifest)
	for _, c := range []string{"agent", "repair"} {
		if got := o.DaemonSet.Spec.Template.Annotations[prefix+c]; got != "unconfined" {
			t.Errorf("1.29: annotation for %s is %q", c, got)
		}
	}
	if o.DaemonSet.Spec.Template.Spec.SecurityContext.AppArmorProfile != nil {
		t.Error("1.29 has no field appArmorProfile")
	}
	a = ask(t, request{KubeVersion: "v1.29.0", Values: values{"appArmorProfile": values{"type": "Localhost", "localhostProfile": "p"}}})
	if got := decode(t, a.Manifest).DaemonSet.Spec.Template.Annotations[prefix+"agent"]; got != "localhost/p" {
		t.Errorf("1.29: annotation is %q", got)
	}
	if strings.Contains(ask(t, request{KubeVersion: "v1.30.0"}).Manifest, prefix) {
		t.Error("1.30 gets the annotation too")
	}
	if a := ask(t, request{KubeVersion: "v1.24.17"}); !strings.Contains(a.Error, "kubeVersion") {
		t.Errorf("1.24: %q", a.Error)
	}
}

func TestNotes(t *testing.T) {
	mustHave := func(req request, has, hasNot []string) {
		t.Helper()
		notes := ask(t, req).Notes
		for _, s := range has {
			if !strings.Contains(notes, s) {
				t.Errorf("%v: the notes lack %q:\n%s", req, s, notes)
			}
		}
		for _, s := range hasNot {
			if strings.Contains(notes, s) {
				t.Errorf("%v: the notes have %q:\n%s", req, s, notes)
			}
		}
	}
	mustHave(
		request{Namespace: "mesh"},
		[]string{"kubectl -n mesh rollout status daemonset/shunt-node", "shunt probe", "shunt status", "localhost/shunt/shunt-node:0.1.0 is in no registry"},
		[]string{"Multus", "repair.enabled", "datapath is"},
	)
	mustHave(request{Values: values{"hub": "registry.example"}}, nil, []string{"in no registry"})
	mustHave(request{Values: on("openshift")}, []string{"k8s.v1.cni.cncf.io/networks: default/shunt-cni"}, nil)
	mustHave(request{Values: values{"repair": values{"enabled": false}}}, []string{"repair.enabled is false"}, nil)
	mustHave(request{Values: values{"datapath": "ebpf"}}, []string{`datapath is "ebpf"`}, nil)
	mustHave(request{Values: values{"nodeSelector": values{"a": "b"}}}, []string{"nodeSelector"}, []string{"started on every node"})
}

// TestFlags compares the containers' arguments with the flags that
// cmd/shunt-node has.
func TestFlags(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "shunt-node")
	if out, err := exec.Command("go", "build", "-o", binary, "../../cmd/shunt-node").CombinedOutput(); err != nil {
		t.Fatalf("build shunt-node: %v\n%s", err, out)
	}
	for _, command := range []string{"agent", "repair"} {
		known := helpOf(t, binary, command)
		for name, req := range cases() {
			c := decode(t, ask(t, req).Manifest).container(command)
			if c == nil {
				continue
			}
			if c.Args[0] != command {
				t.Errorf("%s: container %s runs %q", name, command, c.Args)
			}
			for _, a := range c.Args[1:] {
				flag, _, ok := strings.Cut(strings.TrimPrefix(a, "--"), "=")
				if !ok || !strings.HasPrefix(a, "--") || !slices.Contains(known, flag) {
					t.Errorf("%s: %s has no flag %s", name, command, a)
				}
			}
		}
	}
}

var helpLine = regexp.MustCompile(`(?m)^  -([a-z-]+)`)

// helpOf gives the flags that `shunt-node COMMAND -h` lists.
func helpOf(t *testing.T, binary, command string) (flags []string) {
	t.Helper()
	out, _ := exec.Command(binary, command, "-h").CombinedOutput()
	for _, m := range helpLine.FindAllStringSubmatch(string(out), -1) {
		flags = append(flags, m[1])
	}
	if len(flags) < 5 {
		t.Fatalf("shunt-node %s -h lists %d flags:\n%s", command, len(flags), out)
	}
	return flags
}
