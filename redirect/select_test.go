// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// netips lets cmp see netip's values.
var netips = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, netip.AddrPort{})

// meshed returns an ordinary injected pod, changed by each edit.
func meshed(edits ...func(*Pod)) *Pod {
	pod := &Pod{
		ObjectMeta: ObjectMeta{
			Namespace: "shop", Name: "cart-1", UID: "u-1",
			Labels:      map[string]string{},
			Annotations: map[string]string{keyStatus: "{}"},
		},
		PodSpec: PodSpec{
			Containers: []Container{
				{Name: "app", Ports: []ContainerPort{{ContainerPort: 8080}}},
				{Name: "istio-proxy", Args: []string{"proxy", "sidecar"}, Ports: []ContainerPort{{ContainerPort: 15090}}},
			},
		},
	}
	for _, edit := range edits {
		edit(pod)
	}
	return pod
}

func annotate(key, value string) func(*Pod) { return func(p *Pod) { p.Annotations[key] = value } }
func label(key, value string) func(*Pod)    { return func(p *Pod) { p.Labels[key] = value } }
func unannotate(key string) func(*Pod)      { return func(p *Pod) { delete(p.Annotations, key) } }
func proxyArgs(args ...string) func(*Pod) {
	return func(p *Pod) { p.Container("istio-proxy").Args = args }
}
func hostNetwork(p *Pod)  { p.HostNetwork = true }
func withoutProxy(p *Pod) { p.Containers = p.Containers[:1] }
func withoutApp(p *Pod)   { p.Containers = p.Containers[1:] }

func proxyEnv(name, value string) func(*Pod) {
	return func(p *Pod) {
		c := p.Container("istio-proxy")
		c.Env = append(c.Env, EnvVar{name, value})
	}
}

func initContainers(list ...Container) func(*Pod) {
	return func(p *Pod) { p.InitContainers = append(p.InitContainers, list...) }
}

// nativeSidecar moves the proxy to the init containers.
func nativeSidecar(p *Pod) {
	proxy := *p.Container("istio-proxy")
	proxy.RestartPolicy = "Always"
	p.Containers = p.Containers[:1]
	p.InitContainers = append(p.InitContainers, proxy)
}

func TestEarly(t *testing.T) {
	c := DefaultConfig()
	c.ExcludeNamespaces = []string{"kube-system", "ops"}
	c.Agent = AgentRef{Namespace: "ops2", DaemonSet: "shunt-node"}
	for _, tc := range []struct{ namespace, name, rule, reason string }{
		{"", "x", "P2", "not a Kubernetes pod: CNI_ARGS lacks K8S_POD_NAMESPACE or K8S_POD_NAME"},
		{"ops", "", "P2", "not a Kubernetes pod: CNI_ARGS lacks K8S_POD_NAMESPACE or K8S_POD_NAME"},
		{"ops", "x", "P3", `namespace "ops" is in excludeNamespaces`},
		{"ops", "shunt-node-x2b4z", "P3", `namespace "ops" is in excludeNamespaces`},
		{"ops2", "shunt-node-x2b4z", "P4", "the pod is the node agent itself (DaemonSet ops2/shunt-node)"},
		{"ops2", "shunt-node-x2b4", "", ""},     // too short
		{"ops2", "shunt-node-x2b4zz", "", ""},   // too long
		{"ops2", "shunt-node-debug", "", ""},    // a vowel
		{"ops2", "shunt-node-X2B4Z", "", ""},    // not its alphabet
		{"ops2", "shunt-node-a-x2b4z", "", ""},  // another DaemonSet
		{"ops3", "shunt-node-x2b4z", "", ""},    // another namespace
		{"shop", "kube-system", "", ""},         // a name is not a namespace
		{"kube-system-2", "cart-x2b4z", "", ""}, // nor a prefix
	} {
		got, ok := c.Early(tc.namespace, tc.name)
		want := Outcome{Rule: tc.rule, Skip: tc.rule != "", Reason: tc.reason}
		if ok != want.Skip || got != want {
			t.Errorf("Early(%q, %q) = %+v, %v; want %+v", tc.namespace, tc.name, got, ok, want)
		}
	}
	c.Agent = AgentRef{}
	for _, name := range []string{"-x2b4z", "x2b4z"} {
		if got, ok := c.Early("ns", name); ok {
			t.Errorf("Early by the zero AgentRef = %+v", got)
		}
	}
}

func TestEvaluateRules(t *testing.T) {
	badPorts := annotate(keyExcludeOutboundPorts, "x")
	for _, tc := range []struct {
		name   string
		pod    *Pod
		rule   string
		reason string
	}{
		{"P6a", meshed(hostNetwork), "P6a", "hostNetwork is true: the pod has no network namespace of its own, and the host's is never programmed"},
		{"P6a before P7", meshed(hostNetwork, initContainers(Container{Name: "istio-init"})), "P6a", ""},
		{"P7", meshed(initContainers(Container{Name: "istio-init"})), "P7", `init container "istio-init" programs the pod itself`},
		{"P7 before P8", meshed(withoutProxy, initContainers(Container{Name: "istio-init"})), "P7", ""},
		{"istio-init as a container is nothing", meshed(func(p *Pod) { p.Containers[0].Name = "istio-init" }), "P16", ""},
		{"istio-validation is nothing", meshed(initContainers(Container{Name: "istio-validation"})), "P16", ""},
		{"P8", meshed(withoutProxy), "P8", `no container and no init container is named "istio-proxy": there is no proxy to redirect to`},
		{"P8 before P9, P13", meshed(withoutProxy, unannotate(keyStatus)), "P8", ""},
		{"P8 no containers", &Pod{}, "P8", ""},
		{"P9", meshed(withoutApp), "P9", "long-running containers: 1, at least 2 are needed: a gateway, or the proxy alone"},
		{"P9 before P10", meshed(withoutApp, proxyArgs("proxy", "router")), "P9", ""},
		{"P9 plain init containers don't count", meshed(withoutApp, initContainers(Container{Name: "a"}, Container{Name: "b", RestartPolicy: "Never"})), "P9", ""},
		{"P9 restartable ones do", meshed(withoutApp, initContainers(Container{Name: "a", RestartPolicy: "Always"})), "P16", ""},
		{"P9 a native sidecar counts", meshed(nativeSidecar), "P16", `injected, with proxy container "istio-proxy"`},
		{"P9 an init proxy that ends", meshed(withoutProxy, initContainers(Container{Name: "istio-proxy"})), "P9", ""},
		{"P10", meshed(proxyArgs("proxy", "router")), "P10", `container "istio-proxy" runs as a proxy of type "router", not sidecar`},
		{"P10 native", meshed(proxyArgs("proxy", "router"), nativeSidecar), "P10", ""},
		{"P10 before P11", meshed(proxyArgs("proxy", "router"), proxyEnv(envDisabled, "true")), "P10", ""},
		{"P10 one arg", meshed(proxyArgs("proxy")), "P16", ""},
		{"P10 no args", meshed(proxyArgs()), "P16", ""},
		{"P10 another verb", meshed(proxyArgs("run", "router")), "P16", ""},
		{"P10 more args", meshed(proxyArgs("proxy", "sidecar", "--domain", "x")), "P16", ""},
		{"P10 options first", meshed(proxyArgs("--log", "proxy", "router")), "P16", ""},
		{"P11", meshed(proxyEnv(envDisabled, "true")), "P11", `container "istio-proxy" has DISABLE_ENVOY=true: its proxy is switched off`},
		{"P11 as 1", meshed(proxyEnv(envDisabled, "1")), "P11", ""},
		{"P11 before P12", meshed(proxyEnv(envDisabled, "T"), label(keyInject, "false")), "P11", ""},
		{"P11 false", meshed(proxyEnv(envDisabled, "false")), "P16", ""},
		{"P11 no boolean", meshed(proxyEnv(envDisabled, "yes")), "P16", ""},
		{"P11 last one counts", meshed(proxyEnv(envDisabled, "true"), proxyEnv(envDisabled, "false")), "P16", ""},
		{"P11 of the app", meshed(func(p *Pod) { p.Containers[0].Env = []EnvVar{{envDisabled, "true"}} }), "P16", ""},
		{"P12 label", meshed(label(keyInject, "false")), "P12", `label sidecar.istio.io/inject is "false"`},
		{"P12 annotation", meshed(annotate(keyInject, "F")), "P12", `annotation sidecar.istio.io/inject is "F"`},
		{"P12 label goes first", meshed(label(keyInject, "true"), annotate(keyInject, "false")), "P16", ""},
		{"P12 label goes first, false", meshed(label(keyInject, "0"), annotate(keyInject, "true")), "P12", ""},
		{"P12 an empty label goes first", meshed(label(keyInject, ""), annotate(keyInject, "false")), "P16", ""},
		{"P12 no boolean", meshed(label(keyInject, "no")), "P16", ""},
		{"P12 before P13", meshed(label(keyInject, "false"), unannotate(keyStatus)), "P12", ""},
		{"P13", meshed(unannotate(keyStatus)), "P13", "annotation sidecar.istio.io/status is absent: the pod was never injected"},
		{"P13 empty is present", meshed(annotate(keyStatus, "")), "P16", ""},
		{"P13 before P14", meshed(unannotate(keyStatus), annotate(keyMode, "NONE")), "P13", ""},
		{"P13 before P15", meshed(unannotate(keyStatus), badPorts), "P13", ""},
		{"P14", meshed(annotate(keyMode, "NONE")), "P14", `annotation sidecar.istio.io/interceptionMode is "NONE"`},
		{"P14 before P15", meshed(annotate(keyMode, "NONE"), badPorts), "P14", ""},
		{"P15", meshed(badPorts), "P15", `traffic.sidecar.istio.io/excludeOutboundPorts: value "x": expected item 1, "x", to be a port (1-65535) or a range such as 8000-8100`},
		{"P15 before P15a", meshed(badPorts, func(p *Pod) { p.RuntimeClassName = "gvisor" }), "P15", ""},
		{"P16", meshed(), "P16", `injected, with proxy container "istio-proxy"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := DefaultConfig()
			got := checkEvaluate(t, &c, tc.pod)
			if got.Rule != tc.rule || tc.reason != "" && got.Reason != tc.reason {
				t.Errorf("Evaluate = %s %q, want %s %q", got.Rule, got.Reason, tc.rule, tc.reason)
			}
		})
	}
}

// checkEvaluate checks what holds of every result of Evaluate.
func checkEvaluate(t *testing.T, c *Config, pod *Pod) Outcome {
	t.Helper()
	o, p, err := c.Evaluate(pod)
	var input *InputError
	if o.Reason == "" || o.Rule == "" ||
		(err != nil) != (o.Rule == "P15") || (err != nil && (!errors.As(err, &input) || o.Reason != err.Error())) ||
		(p != nil) != (o.Rule == "P16") ||
		o.Skip == (o.Rule == "P15" || o.Rule == "P16") {
		t.Fatalf("Evaluate = %+v, %+v, %v: they don't fit", o, p, err)
	}
	if p == nil {
		return o
	}
	if p.Mode != ModeRedirect && p.Mode != ModeTProxy ||
		p.IncludeOutbound.All && p.IncludeOutbound.List != nil ||
		p.IncludeInboundPorts.All && p.IncludeInboundPorts.Ranges != nil ||
		p.IncludeOutboundPorts.All && p.IncludeOutboundPorts.Ranges != nil ||
		!p.IncludeInboundPorts.All && p.ExcludeInboundPorts != nil {
		t.Fatalf("Evaluate made a Policy that breaks its own invariants: %+v", p)
	}
	for _, ranges := range [][]PortRange{p.IncludeInboundPorts.Ranges, p.ExcludeInboundPorts, p.IncludeOutboundPorts.Ranges, p.ExcludeOutboundPorts} {
		checkRanges(t, ranges)
	}
	return o
}

func checkRanges(t *testing.T, ranges []PortRange) {
	t.Helper()
	end := -1
	for _, r := range ranges {
		if r.First == 0 || r.First > r.Last || int(r.First) <= end+1 && end >= 0 {
			t.Fatalf("ranges %v: not sorted, disjoint and apart", ranges)
		}
		end = int(r.Last)
	}
}

func TestEvaluateCustomProxyName(t *testing.T) {
	c := DefaultConfig()
	c.ProxyContainer = "envoy"
	if o := checkEvaluate(t, &c, meshed()); o.Rule != "P8" {
		t.Errorf("Evaluate = %+v, want P8", o)
	}
	pod := meshed(func(p *Pod) { p.Containers[1].Name = "envoy" })
	if o := checkEvaluate(t, &c, pod); o.Rule != "P16" {
		t.Errorf("Evaluate = %+v, want P16", o)
	}
}

func TestEvaluateBackendFacts(t *testing.T) {
	c := DefaultConfig()
	c.NativeRuntimeClasses = []string{"nvidia", "crun"}
	type facts struct {
		RuntimeClass      string
		HostUsers         bool
		SecondaryNetworks bool
	}
	networks := func(v string) func(*Pod) { return annotate(keyNetworks, v) }
	class := func(v string) func(*Pod) { return func(p *Pod) { p.RuntimeClassName = v } }
	for _, tc := range []struct {
		name string
		edit func(*Pod)
		want facts
	}{
		{"plain", func(*Pod) {}, facts{HostUsers: true}},
		{"hostUsers true", func(p *Pod) { p.HostUsers = ptr(true) }, facts{HostUsers: true}},
		{"hostUsers false", func(p *Pod) { p.HostUsers = ptr(false) }, facts{}},
		{"gvisor", class("gvisor"), facts{RuntimeClass: "gvisor", HostUsers: true}},
		{"native", class("crun"), facts{HostUsers: true}},
		{"empty", networks(""), facts{HostUsers: true}},
		{"spaces", networks(" \n"), facts{HostUsers: true}},
		{"own", networks("shunt-cni"), facts{HostUsers: true}},
		{"own with all parts", networks(" mesh/shunt-cni@net7 "), facts{HostUsers: true}},
		{"own twice", networks("a/shunt-cni, b/shunt-cni"), facts{HostUsers: true}},
		{"own in JSON", networks(`[{"name": "shunt-cni", "namespace": "default", "interface": "net1"}]`), facts{HostUsers: true}},
		{"no networks in JSON", networks(`[]`), facts{HostUsers: true}},
		{"another", networks("macvlan"), facts{HostUsers: true, SecondaryNetworks: true}},
		{"own and another", networks("shunt-cni,macvlan@net2"), facts{HostUsers: true, SecondaryNetworks: true}},
		{"own as a namespace", networks("shunt-cni/sriov"), facts{HostUsers: true, SecondaryNetworks: true}},
		{"own as an interface", networks("sriov@shunt-cni"), facts{HostUsers: true, SecondaryNetworks: true}},
		{"too many parts", networks("a/b/shunt-cni"), facts{HostUsers: true, SecondaryNetworks: true}},
		{"doubled comma", networks("shunt-cni,,shunt-cni"), facts{HostUsers: true, SecondaryNetworks: true}},
		{"another in JSON", networks(`[{"name":"shunt-cni"},{"name":"sriov"}]`), facts{HostUsers: true, SecondaryNetworks: true}},
		{"no name in JSON", networks(`[{"interface":"net1"}]`), facts{HostUsers: true, SecondaryNetworks: true}},
		{"not quite JSON", networks(`[{"name":"shunt-cni"}`), facts{HostUsers: true, SecondaryNetworks: true}},
		{"not a list", networks(`{"name":"shunt-cni"}`), facts{HostUsers: true, SecondaryNetworks: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, p, err := c.Evaluate(meshed(tc.edit))
			if err != nil {
				t.Fatal(err)
			}
			got := facts{p.RuntimeClass, p.HostUsers, p.SecondaryNetworks}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzEvaluate(f *testing.F) {
	f.Add("10.0.0.0/8", "", "80,443", "", "", "", "eth1", "", "REDIRECT", "", "true", "false", int64(0))
	f.Add("*", "::1", "*", "15021", "*", "1-65535", "", "vif0,", "TPROXY", `[{"name":"x"}]`, "x", "", int64(-1))
	f.Add("", "::ffff:10.0.0.0/104", "", "", "", "", "", "", "NONE", "a/b@c", "", "1", int64(1<<32))
	c := DefaultConfig()
	f.Fuzz(func(t *testing.T, inclCIDR, exclCIDR, inclIn, exclIn, inclOut, exclOut, exclIf, reroute, mode, networks, dns, drop string, uid int64) {
		pod := meshed(
			annotate(keyIncludeOutboundRanges, inclCIDR), annotate(keyExcludeOutboundRanges, exclCIDR),
			annotate(keyIncludeInboundPorts, inclIn), annotate(keyExcludeInboundPorts, exclIn),
			annotate(keyIncludeOutboundPorts, inclOut), annotate(keyExcludeOutboundPorts, exclOut),
			annotate(keyExcludeInterfaces, exclIf), annotate(keyRerouteInterfaces, reroute),
			annotate(keyMode, mode), annotate(keyNetworks, networks),
			proxyEnv(keyDNSCapture, dns), proxyEnv(keyInvalidDrop, drop),
			func(p *Pod) { p.Container("istio-proxy").SecurityContext = &SecurityContext{RunAsUser: &uid} },
		)
		checkEvaluate(t, &c, pod)
	})
}
