// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"shunt.dev/shunt/internal/spool"
	"shunt.dev/shunt/redirect"
)

// metrics are the agent's; docs/OPERATIONS.md says what each means.
type metrics struct {
	registry *prometheus.Registry

	setup     *prometheus.HistogramVec
	pods      *prometheus.GaugeVec
	problems  *prometheus.GaugeVec
	fallbacks *prometheus.CounterVec
	flows     *prometheus.CounterVec
	errors    *prometheus.CounterVec
	installs  *prometheus.CounterVec
}

// setupBuckets go from what eBPF takes on an idle machine to the 30 s that facts
// may take.
var setupBuckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}

// newMetrics makes them; installed says at each scrape whether the plugin is.
func newMetrics(installed func() bool) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		setup: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "shunt_pod_setup_seconds", Help: "How long the plugin took to set up a pod of the mesh, by what redirects it and what came of it.",
			Buckets: setupBuckets,
		}, []string{"backend", "result"}),
		pods: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "shunt_pods", Help: "Pods of this node that are redirected, by what redirects them.",
		}, []string{"backend"}),
		problems: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "shunt_pod_problems", Help: "Pods of this node that have a problem now, by problem; the log and `shunt status` say which, and what mends it.",
		}, []string{"problem"}),
		fallbacks: counter("shunt_fallback_total", "Pods that iptables was to redirect though nobody had asked for it, by reason.", "reason"),
		flows:     counter("shunt_flows_total", "Connections of this node's pods that a rule has decided (eBPF only).", "direction", "rule"),
		errors:    counter("shunt_datapath_errors_total", "What the eBPF programs of this node's pods could not do.", "program", "error"),
		installs:  counter("shunt_install_total", "Attempts to put the plugin on the node or to mend what others changed, by result.", "result"),
	}
	// What is alerted on has a beginning, so that the first time counts.
	for _, backend := range []string{string(redirect.EBPF), string(redirect.Iptables), backendNone} {
		m.setup.WithLabelValues(backend, spool.ResultFailed)
	}
	for _, reason := range redirect.FallbackReasons() {
		m.fallbacks.WithLabelValues(string(reason))
	}
	ready := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "shunt_install_ready", Help: "1 while the plugin is on the node and in its CNI chain, 0 while not.",
	}, func() float64 {
		if installed() {
			return 1
		}
		return 0
	})
	m.registry.MustRegister(m.setup, m.pods, m.problems, m.fallbacks, m.flows, m.errors, m.installs, ready,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}
