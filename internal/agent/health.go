// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A condition is one of those for the agent to be ready. text says what is, or
// what is missing, in words.
type condition struct {
	name  string
	check func() (ok bool, text string)
	// told says that it is told and no more: it is of single pods, and an agent
	// that is not ready for their sake would hold up its own update.
	told bool
}

// health answers /healthz and /readyz.
type health struct {
	loops      *loops
	conditions []condition
}

// readiness asks every condition.
func (h *health) readiness() (ready bool, body string) {
	var b strings.Builder
	ready = true
	for _, c := range h.conditions {
		ok, text := c.check()
		mark := "ok "
		switch {
		case ok:
		case c.told:
			mark = "see"
		default:
			ready, mark = false, "NOT"
		}
		fmt.Fprintf(&b, "[%s] %s: %s\n", mark, c.name, strings.ReplaceAll(text, "\n", "; "))
	}
	return ready, b.String()
}

// Describe and Collect make a prometheus.Collector of it: shunt_ready, by condition.
func (h *health) Describe(ch chan<- *prometheus.Desc) { ch <- readyDesc }

// Collect asks every condition.
func (h *health) Collect(ch chan<- prometheus.Metric) {
	for _, c := range h.conditions {
		value := 0.0
		if ok, _ := c.check(); ok {
			value = 1
		}
		if !c.told {
			ch <- prometheus.MustNewConstMetric(readyDesc, prometheus.GaugeValue, value, c.name)
		}
	}
}

var readyDesc = prometheus.NewDesc("shunt_ready", "1 while a condition of the agent's readiness holds, 0 while not; /readyz says why.", []string{"condition"}, nil)

func (h *health) handler() http.Handler {
	mux := http.NewServeMux()
	// The kubelet restarts an agent that is not healthy. That an API server is
	// down is nothing that this would mend.
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if err := h.loops.stuck(time.Now()); err != nil {
			respond(w, http.StatusInternalServerError, err.Error()+"\n")
			return
		}
		respond(w, http.StatusOK, "ok\n")
	})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		ready, body := h.readiness()
		status := http.StatusOK
		if !ready {
			status = http.StatusServiceUnavailable
		}
		respond(w, status, body)
	})
	return mux
}

func respond(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	fmt.Fprint(w, body)
}
