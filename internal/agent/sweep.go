// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"time"

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
	status  func(context.Context, *config) ([]backends.Status, error)
	metrics *metrics
	log     *slog.Logger

	accounts *accounts
	shown    map[series]uint64 // what of their totals metrics have
	told     map[problem]bool  // what has been logged
	failed   string            // how the last sweep did
}

// A problem is one of a pod, as far as it is to be told once.
type problem struct{ pod, name string }

func newSweeper(f *configFile, runDir string, m *metrics, log *slog.Logger) *sweeper {
	s := &sweeper{
		config: f, metrics: m, log: log, shown: map[series]uint64{}, told: map[problem]bool{},
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
		s.count(pods)
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

// count sets shunt_pods.
func (s *sweeper) count(pods []backends.Status) {
	n := map[redirect.Datapath]int{redirect.EBPF: 0, redirect.Iptables: 0}
	for i := range pods {
		n[pods[i].Datapath]++
	}
	for d, count := range n {
		s.metrics.pods.WithLabelValues(string(d)).Set(float64(count))
	}
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
	s.log.Warn("a pod has a problem", "pod", st.Pod.Namespace+"/"+st.Pod.Name, "problem", p.Name, "what", p.Text,
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
