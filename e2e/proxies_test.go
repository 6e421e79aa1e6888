// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"context"
	"net/netip"
	"net/url"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"shunt.dev/shunt/e2e/wire"
)

// eachDatapath runs a test on either way that a pod may be redirected, both at
// once, and waits for them.
func eachDatapath(t *testing.T, test func(t *testing.T, datapath string)) {
	t.Run("by", func(t *testing.T) {
		for _, datapath := range []string{"ebpf", "iptables"} {
			t.Run(datapath, func(t *testing.T) {
				t.Parallel()
				test(t, datapath)
			})
		}
	})
}

// capturing has a pod's questions to nameservers go to its proxy. The pod's own
// nameserver is the node's, outside of the mesh.
func capturing(p *corev1.Pod) {
	withNameserver(p)
	proxy := containerOf(p, "istio-proxy")
	proxy.Env = append(proxy.Env, corev1.EnvVar{Name: "ISTIO_META_DNS_CAPTURE", Value: "true"})
}

func withNameserver(p *corev1.Pod) {
	p.Spec.DNSPolicy = corev1.DNSNone
	p.Spec.DNSConfig = &corev1.PodDNSConfig{Nameservers: []string{nodeIP}}
}

// A pod with DNS capture asks its proxy, whoever it thinks it asks, over UDP and
// TCP, and what it then connects to goes to the proxy as well.
func TestDNS(t *testing.T) {
	install(t, defaults)
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- wire.ServeDNS(ctx, hostPort(nodeIP, 53), wire.SinkAddrs) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Errorf("the nameserver outside of the mesh: %v", err)
		}
	})
	const name = "shop.test"
	ask := func(p *corev1.Pod, network, server string) (r wire.Resolved) {
		get(t, p, wire.ControlPort, "/resolve?"+url.Values{"network": {network}, "server": {server}, "name": {name}}.Encode(), &r)
		slices.Sort(r.Addrs)
		return r
	}
	resolved := func(a wire.Addrs) wire.Resolved {
		r := wire.Resolved{Addrs: []string{a.V4.String(), a.V6.String()}}
		slices.Sort(r.Addrs)
		return r
	}
	node := hostPort(nodeIP, 53)

	o := start(t, plain("asks", withNameserver))
	for _, network := range []string{"udp", "tcp"} {
		if diff := cmp.Diff(resolved(wire.SinkAddrs), ask(o, network, node)); diff != "" {
			t.Errorf("a pod outside of the mesh asks over %s (-want +got):\n%s", network, diff)
		}
	}
	u := start(t, meshed("asks-uncaptured", withNameserver))
	if diff := cmp.Diff(resolved(wire.SinkAddrs), ask(u, "udp", node)); diff != "" {
		t.Errorf("a pod without capture asks over UDP (-want +got):\n%s", diff)
	}
	eachDatapath(t, func(t *testing.T, datapath string) {
		p := start(t, meshed("asks-"+datapath, capturing, annotated(keyDatapath, datapath)))
		for _, network := range []string{"udp", "tcp"} {
			for _, server := range []string{node, "[2001:db8::53]:53"} {
				if diff := cmp.Diff(resolved(wire.ProxyAddrs), ask(p, network, server)); diff != "" {
					t.Errorf("ask %s over %s (-want +got):\n%s", server, network, diff)
				}
			}
		}
		// By the pod's own resolv.conf, as any program does it.
		d := dialFrom(t, p, name+":80")
		peer, err := netip.ParseAddrPort(d.Peer)
		if err != nil || (peer.Addr() != wire.ProxyAddrs.V4 && peer.Addr() != wire.ProxyAddrs.V6) || d.Answer.Who != "proxy" || d.Answer.OriginalDst != d.Peer {
			t.Errorf("dial %s: got %+v: expected that the proxy answers for an address of its own, %+v", name, d, wire.ProxyAddrs)
		}
		wantRedirected(t, p)
		wantGone(t, p)
	})
	deletePod(t, u.Name)
	wantNoTraces(t)
}

// haproxyConfig has HAProxy pass requests on to where they were to go, which it
// asks SO_ORIGINAL_DST for (IPv4 only), and write into their header that it did.
const haproxyConfig = `
global
	maxconn 256
	log stdout format raw local0

defaults
	mode http
	log global
	timeout connect 10s
	timeout client 60s
	timeout server 60s

frontend outbound
	bind 0.0.0.0:15001
	http-request add-header X-Through "outbound %[dst]:%[dst_port]"
	default_backend original

frontend inbound
	bind 0.0.0.0:15006
	http-request add-header X-Through "inbound %[dst]:%[dst_port]"
	default_backend app

frontend health
	bind 0.0.0.0:15020
	monitor-uri /healthz

backend original
	option transparent

backend app
	option transparent
	source 127.0.0.6
`

// haproxied has HAProxy as the pod's proxy.
func haproxied(p *corev1.Pod) {
	proxy := containerOf(p, "istio-proxy")
	proxy.Image, proxy.Args = "localhost/shunt-e2e/haproxy:1", []string{"-db", "-f", "/config/haproxy.cfg"}
	proxy.VolumeMounts = []corev1.VolumeMount{{Name: "config", MountPath: "/config", ReadOnly: true}}
	p.Spec.Volumes = []corev1.Volume{{Name: "config", VolumeSource: corev1.VolumeSource{
		ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "haproxy"}},
	}}}
}

// Two pods whose proxies are HAProxy talk to each other, and to the world.
func TestHAProxy(t *testing.T) {
	install(t, defaults)
	apply(t, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "haproxy", Namespace: space},
		Data:       map[string]string{"haproxy.cfg": haproxyConfig},
	})
	eachDatapath(t, func(t *testing.T, datapath string) {
		a := start(t, meshed("haproxy-a-"+datapath, haproxied, annotated(keyDatapath, datapath)))
		b := start(t, meshed("haproxy-b-"+datapath, haproxied, annotated(keyDatapath, datapath)))
		to := hostPort(b.Status.PodIP, wire.AppPort)
		check := func(what string, got wire.Answer, who, pod, peer string, through ...string) {
			t.Helper()
			addr, err := netip.ParseAddrPort(got.Peer)
			if err != nil || got.Who != who || got.Pod != pod || addr.Addr().String() != peer || !slices.Equal(got.Through, through) {
				t.Errorf("%s: got %+v: expected %s of pod %q, for %s, through %q", what, got, who, pod, peer, through)
			}
		}
		d := dialFrom(t, a, to)
		check("from one pod to the other", d.Answer, "app", b.Name, "127.0.0.6", "outbound "+to, "inbound "+to)
		if d.Peer != to {
			t.Errorf("the client's peer is %q: expected %s", d.Peer, to)
		}
		check("to the world", dialFrom(t, a, sinkAddr).Answer, "sink", "", a.Status.PodIP, "outbound "+sinkAddr)
		var got wire.Answer
		if err := ask(to, "/", &got); err != nil {
			t.Error(err)
		}
		check("from the node", got, "app", b.Name, "127.0.0.6", "inbound "+to)
		for _, p := range []*corev1.Pod{a, b} {
			e := awaitEarly(t, p)
			if len(e.Around) > 0 {
				t.Errorf("pod %s: %d of %d connections went around HAProxy: %+v", p.Name, len(e.Around), e.Answered, e.Around[0])
			}
			wantDatapath(t, p, datapath)
			wantGone(t, p)
		}
	})
	wantNoTraces(t)
}
