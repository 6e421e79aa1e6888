// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net/http"
	"strings"
	"time"
)

// A condition is one of those for the agent to be ready. text says what is, or
// what is missing, in words.
type condition struct {
	name  string
	check func() (ok bool, text string)
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
		if !ok {
			ready, mark = false, "NOT"
		}
		fmt.Fprintf(&b, "[%s] %s: %s\n", mark, c.name, strings.ReplaceAll(text, "\n", "; "))
	}
	return ready, b.String()
}

func (h *health) handler() http.Handler {
	mux := http.NewServeMux()
	// The kubelet restarts an agent that is not healthy. That an API server is
	// down is nothing that this would mend.
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if err := h.loops.stuck(time.Now()); err != nil {
			answer(w, http.StatusInternalServerError, err.Error()+"\n")
			return
		}
		answer(w, http.StatusOK, "ok\n")
	})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		ready, body := h.readiness()
		status := http.StatusOK
		if !ready {
			status = http.StatusServiceUnavailable
		}
		answer(w, status, body)
	})
	return mux
}

func answer(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	fmt.Fprint(w, body)
}
