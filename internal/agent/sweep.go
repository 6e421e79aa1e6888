// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"shunt.dev/shunt/internal/found"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/backends"
)

// sweepInterval is how often the pods' counters are read: at every scrape or so.
const sweepInterval = 15 * time.Second

// sweepTimeout bounds one look at all pods.
const sweepTimeout = time.Minute

// A sweeper looks at the pods that are redirected: how many there are, what
// their programs have counted, what is wrong with them.
type sweeper struct {
	config  *configFile
	runDir  string
	status  func(context.Context, *config) ([]backends.Status, error)
	metrics *metrics
	log     *slog.Logger

	accounts *accounts
	shown    map[series]uint64 // what of their totals metrics have
	told     map[problem]bool  // what has been logged
	failed   string            // how the last sweep did

	mu    sync.Mutex
	state *redirection // nil: nobody has looked yet
}

// A redirection is what became of the node's pods, by the last sweep.
type redirection struct {
	pods     map[redirect.Datapath]int
	problems map[string][]string // by the problem's name, the pods that have it
	err      error               // why that may not be all
}

// A problem is one of a pod, as far as it is to be told once.
type problem struct{ pod, name string }

func newSweeper(f *configFile, runDir string, m *metrics, log *slog.Logger) *sweeper {
	s := &sweeper{
		config: f, runDir: runDir, metrics: m, log: log, shown: map[series]uint64{}, told: map[problem]bool{},
		status: func(ctx context.Context, c *config) ([]backends.Status, error) {
			return backends.New(backends.Options{BPFDir: c.BPFDir, RunDir: runDir, Log: log}).Status(ctx)
		},
	}
	var err error
	if s.accounts, err = openAccounts(runDir); err != nil {
		log.Warn("counters begin anew", "error", err)
	}
	s.show()
	return s
}

func (s *sweeper) run(ctx context.Context, beat func()) error {
	for {
		beat()
		c, changed := s.config.get()
		if c != nil {
			s.sweep(ctx, c)
			changed = nil
		}
		if !wait(ctx, sweepInterval, changed) {
			return ctx.Err()
		}
	}
}

// sweep looks at all pods once.
func (s *sweeper) sweep(ctx context.Context, c *config) {
	ctx, cancel := context.WithTimeout(ctx, sweepTimeout)
	defer cancel()
	pods, err := s.status(ctx, c)
	s.say(ctx, "the pods' state can't be read, or not all of it", err)
	if ctx.Err() == nil {
		s.count(pods, err)
	}
	// What has gone can be told only from a list that is whole.
	whole := err == nil
	counts := map[string]map[series]uint64{}
	for i := range pods {
		st := &pods[i]
		id := st.ContainerID + "@" + st.IfName
		counts[id] = countsOf(st)
		for _, p := range st.Problems {
			s.tell(id, st, p)
		}
	}
	if whole {
		for p := range s.told {
			if _, ok := counts[p.pod]; !ok {
				delete(s.told, p)
			}
		}
	}
	s.accounts.book(counts, whole)
	if err := s.accounts.save(); err != nil {
		s.log.Warn("counters may jump when the agent is started again", "error", err)
	}
	s.show()
}

func countsOf(st *backends.Status) map[series]uint64 {
	counts := map[series]uint64{}
	for _, f := range st.Flows {
		counts[series{metricFlows, f.Direction, f.Rule}] += f.Count
	}
	for _, e := range st.Errors {
		counts[series{metricErrors, e.Program, e.Error}] += e.Count
	}
	return counts
}

// count sets shunt_pods and shunt_pod_problems, and what /readyz says.
func (s *sweeper) count(pods []backends.Status, err error) {
	now := &redirection{pods: map[redirect.Datapath]int{redirect.EBPF: 0, redirect.Iptables: 0}, problems: map[string][]string{}, err: err}
	for i := range pods {
		st := &pods[i]
		now.pods[st.Datapath]++
		for _, p := range st.Problems {
			if !hidden[p.Name] {
				now.problems[p.Name] = append(now.problems[p.Name], nameOf(st.Pod))
			}
		}
	}
	lost, err := found.Read(s.runDir)
	now.err = errors.Join(now.err, err)
	for _, pod := range found.Missing(lost, pods) {
		now.problems[found.Problem] = append(now.problems[found.Problem], nameOf(pod))
	}
	for d, count := range now.pods {
		s.metrics.pods.WithLabelValues(string(d)).Set(float64(count))
	}
	s.metrics.problems.Reset()
	for name, pods := range now.problems {
		s.metrics.problems.WithLabelValues(name).Set(float64(len(pods)))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = now
}

func nameOf(p redirect.PodRef) string { return p.Namespace + "/" + p.Name }

// condition is what /readyz says.
func (s *sweeper) condition() (ok bool, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == nil {
		return true, "the node's pods have not been looked at yet"
	}
	text = fmt.Sprintf("%d pods by ebpf, %d by iptables", s.state.pods[redirect.EBPF], s.state.pods[redirect.Iptables])
	for _, name := range slices.Sorted(maps.Keys(s.state.problems)) {
		pods := s.state.problems[name]
		text += fmt.Sprintf("; %d with problem %s (%s", len(pods), name, pods[0])
		if len(pods) > 1 {
			text += " …"
		}
		text += ")"
	}
	if len(s.state.problems) > 0 {
		text += ": `shunt status` on the node says more"
	}
	if s.state.err != nil {
		text += fmt.Sprintf("; not all can be told: %v", s.state.err)
	}
	return len(s.state.problems) == 0 && s.state.err == nil, text
}

// hidden are the problems that only those can tell who see network namespaces
// and may enter them. The agent can't; `shunt status` on the node can. Of pods with
// another build's programs the upkeeper tells.
var hidden = map[string]bool{
	backends.ProblemStale: true, backends.ProblemHookUnknown: true, backends.ProblemRules: true, backends.ProblemOtherBuild: true,
}

// tell logs a pod's problem, once for as long as the pod is there.
func (s *sweeper) tell(id string, st *backends.Status, p backends.Problem) {
	key := problem{id, p.Name}
	if s.told[key] || hidden[p.Name] {
		return
	}
	s.told[key] = true
	s.log.Warn("a pod has a problem", "pod", nameOf(st.Pod), "problem", p.Name, "what", p.Text,
		"remedy", p.Remedy, "container", st.ContainerID, "backend", st.Datapath)
}

// show brings the metrics to where the accounts are.
func (s *sweeper) show() {
	for key, total := range s.accounts.totals {
		grown := total - s.shown[key]
		s.shown[key] = total
		counter := s.metrics.flows
		if key.Metric == metricErrors {
			counter = s.metrics.errors
		}
		counter.WithLabelValues(key.A, key.B).Add(float64(grown))
	}
}

// say logs an error when it is another than the last.
func (s *sweeper) say(ctx context.Context, msg string, err error) {
	if err == nil {
		s.failed = ""
		return
	}
	if text := err.Error(); text != s.failed && ctx.Err() == nil {
		s.failed = text
		s.log.Warn(msg, "error", err)
	}
}
