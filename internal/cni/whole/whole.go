// SPDX-License-Identifier: Apache-2.0

// Package whole is all that a request to the plugin may need: both sources of facts,
// and both backends. Together they make a process slow to start; see package
// handover.
package whole

import (
	"context"
	"log/slog"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/internal/podfacts"
	"shunt.dev/shunt/internal/podfacts/apiserver"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/backends"
	"shunt.dev/shunt/redirect/iptables"
)

// Facts returns the sources of pod facts, in the order of asking. hung says that the
// agent has just let its time pass: it is not asked again at once.
func Facts(conf *netconf.Config, log *slog.Logger, version string, hung bool) *podfacts.Fetcher {
	var agent podfacts.Source = podfacts.NewAgent(conf.RunDir)
	if hung {
		agent = &hungAgent{Source: agent}
	}
	return &podfacts.Fetcher{
		Sources: []podfacts.Source{agent, apiserver.New(conf.Kubeconfig, "shunt-cni/"+version)},
		Timeout: conf.PodFactsTimeout,
		Log:     log,
	}
}

// A hungAgent is one that is known to hang. The first question is not put to it.
type hungAgent struct {
	podfacts.Source
	known bool
}

func (a *hungAgent) Pod(ctx context.Context, namespace, name, uid string) (*redirect.Pod, error) {
	if !a.known {
		a.known = true
		return nil, podfacts.ErrHung
	}
	return a.Source.Pod(ctx, namespace, name, uid)
}

// Backends returns both backends; path is where iptables' programs are looked for, as
// $PATH has it.
func Backends(conf *netconf.Config, log *slog.Logger, path string) *backends.Backends {
	return backends.New(backends.Options{
		BPFDir: conf.BPFDir, RunDir: conf.RunDir, Log: log,
		Iptables: iptables.Mode(conf.IptablesBackend), IptablesPath: path,
	})
}
