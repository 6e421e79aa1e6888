// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"github.com/prometheus/client_golang/prometheus"
)

// A kind is what a count is about: what was done to a pod that fails its
// validation, or what was found of one that runs.
type kind string

// The kinds, label type of the metric.
const (
	kindRepair kind = "repair" // mended in place
	kindDelete kind = "delete"
	kindLabel  kind = "label"
	kindLost   kind = "lost"  // it runs, and nothing is programmed
	kindWrong  kind = "wrong" // it runs, and what is programmed differs
)

// A result is what came of it.
type result string

// The results, label result of the metric.
const (
	resultOK      result = "ok"
	resultFailed  result = "failed"  // an attempt; it is repeated
	resultSkipped result = "skipped" // rightly let alone; the log and an event say why
	resultAlready result = "already" // it was as it should be
	resultFound   result = "found"   // lost or wrong; mended only with --repair-pods
)

// metrics are those of the controller.
type metrics struct {
	pods *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{pods: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "shunt_repair_pods_total",
		Help: "Pods of this node without the redirection that they ought to have, by what was done or found and what came of it.",
	}, []string{"type", "result"})}
	for _, k := range []kind{kindRepair, kindDelete, kindLabel, kindLost, kindWrong} {
		for _, x := range []result{resultOK, resultFailed} {
			m.pods.WithLabelValues(string(k), string(x)) // so that a rate has a beginning
		}
	}
	for _, k := range []kind{kindLost, kindWrong} {
		m.pods.WithLabelValues(string(k), string(resultFound))
	}
	r.MustRegister(m.pods)
	return m
}

func (m *metrics) count(k kind, r result) { m.pods.WithLabelValues(string(k), string(r)).Inc() }
