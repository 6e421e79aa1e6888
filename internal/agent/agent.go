// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"time"

	"k8s.io/client-go/kubernetes"

	"shunt.dev/shunt/install"
	"shunt.dev/shunt/internal/podcache"
	"shunt.dev/shunt/redirect"
)

// Options say what the agent is to do, and where. Paths are as its process sees
// them.
type Options struct {
	Netconf string // the plugin's network configuration: a file
	RunDir  string // made, 0700, when missing

	BinDir, ConfDir string // the runtime's
	ConfFile        string // the file to join or write; empty: the first
	Chained         bool
	BinariesDir     string // where the plugin's binaries come from
	CacheDir        string // the runtime's memory of pods; empty: not to be had
	// Kubeconfig's TokenFile is that of the agent's pod; what goes into the
	// kubeconfig is another, see tokenKeeper.
	Kubeconfig install.KubeconfigOptions

	Namespace, DaemonSet string // of the agent itself
	Node                 string
	Client               kubernetes.Interface

	MetricsAddress, HealthAddress string
	Log                           *slog.Logger
}

// How long the agent takes to end, at most; see docs/OPERATIONS.md.
const (
	endTimeout       = 5 * time.Second
	uninstallTimeout = 15 * time.Second
)

// An Agent is the node agent.
type Agent struct {
	opts     Options
	log      *slog.Logger
	loops    *loops
	watchers *loops // which client-go may be slow to end, and that have nothing to finish
	config   *configFile
	metrics  *metrics
	cache    *podcache.Cache
	datapath *preloader
	keeper   *keeper
	relay    *relay
	sweeper  *sweeper
	upkeeper *upkeeper
	owner    *owner
	token    *tokenKeeper
	fatal    chan error
}

// New prepares an agent.
func New(opts Options) (*Agent, error) {
	if err := os.MkdirAll(opts.RunDir, 0o700); err != nil {
		return nil, fmt.Errorf("make --run-dir: %w", err)
	}
	a := &Agent{opts: opts, log: opts.Log, loops: &loops{log: opts.Log}, watchers: &loops{log: opts.Log}, fatal: make(chan error, 1)}
	a.config = newConfigFile(opts.Netconf, opts.RunDir, a.log)
	a.cache = podcache.New(podcache.Options{Client: opts.Client, Node: opts.Node, RunDir: opts.RunDir, Log: a.log})
	a.datapath = newPreloader(a.config, opts.RunDir, a.log)
	a.keeper = &keeper{config: a.config, open: a.openInstallation, ready: a.beforeInstall, log: a.log, fatal: func(err error) {
		select {
		case a.fatal <- err:
		default:
		}
	}}
	a.metrics = newMetrics(func() bool { return a.keeper.state().Installed })
	a.relay = &relay{runDir: opts.RunDir, log: a.log.Handler(), metrics: a.metrics}
	a.sweeper = newSweeper(a.config, opts.RunDir, a.metrics, a.log)
	a.upkeeper = newUpkeeper(a.config, opts.RunDir, func() bool { st := a.keeper.state(); return st.Installed && !st.Behind }, a.log)
	a.token = newTokenKeeper(opts.Client, opts.RunDir, opts.Kubeconfig.TokenFile, a.log)
	a.opts.Kubeconfig.TokenFile = a.token.path
	a.owner = newOwner(opts.Client, opts.Namespace, opts.DaemonSet, opts.Node, a.log)
	return a, nil
}

// installOptions say how the plugin is installed by a netconf.
func (o *Options) installOptions(entry []byte) install.Options {
	return install.Options{
		BinDir: o.BinDir, ConfDir: o.ConfDir, RunDir: o.RunDir, ConfFile: o.ConfFile, Chained: o.Chained,
		Entry: entry, BinariesDir: o.BinariesDir, CacheDir: o.CacheDir, Kubeconfig: o.Kubeconfig, Log: o.Log,
		Agent: redirect.AgentRef{Namespace: o.Namespace, DaemonSet: o.DaemonSet},
	}
}

func (a *Agent) openInstallation(c *config) (installation, error) {
	opts := a.opts.installOptions(c.raw)
	if c.Kubeconfig != opts.Kubeconfig.Path {
		a.log.Warn("the netconf names another kubeconfig than the agent's: the plugin uses that, and somebody else has to write it",
			"kubeconfig", c.Kubeconfig, "agent's", opts.Kubeconfig.Path)
	}
	opts.OnResult = func(result string) { a.metrics.installs.WithLabelValues(result).Inc() }
	return install.New(opts)
}

// beforeInstall waits until a pod that starts would have to wait for nothing.
func (a *Agent) beforeInstall(ctx context.Context) {
	select {
	case <-a.datapath.first:
	case <-ctx.Done():
	}
	for ctx.Err() == nil && !a.cache.Synced() {
		_ = wait(ctx, 50*time.Millisecond, nil)
	}
}

// Run runs the agent until ctx ends, and takes the plugin from the node if it
// is not to have it any more. It fails where that fails, and where only a new
// process can go on.
func (a *Agent) Run(ctx context.Context) error {
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	a.config.read() // so that what starts now finds one
	if err := a.token.prepare(); err != nil {
		a.log.Error("the plugin's kubeconfig has no token yet", "error", err)
	}
	cache := a.watchers.startOther(work, "pod cache", a.cache.Run)
	keeper := a.loops.startOther(work, "install", a.keeper.run)
	a.loops.start(work, "netconf", a.config.run)
	a.loops.start(work, "datapath", a.datapath.run)
	a.loops.start(work, "token", a.token.run)
	a.loops.start(work, "plugin's log", a.relay.run)
	a.loops.start(work, "pods' state", a.sweeper.run)
	a.loops.start(work, "upkeep", a.upkeeper.run)
	a.watchers.startOther(work, "DaemonSet", a.owner.run)
	a.serve(work, cache, keeper)
	late := context.WithoutCancel(ctx)
	select {
	case <-ctx.Done():
	case err := <-a.fatal:
		stop()
		a.end(late)
		return err
	}

	// The loops go on meanwhile: pods start while an agent ends.
	v, why := a.owner.verdict(late)
	switch v {
	case keep:
		a.log.Info("the agent ends; the plugin stays", "why", why)
	case remove:
		a.log.Info("the agent ends; the plugin goes", "why", why)
	case unknown:
		a.log.Warn("the agent ends; whether the node is still to have the plugin can't be told, and it stays. "+
			"If it is to go, run `shunt-node uninstall` on the node", "why", why)
	}
	stop()
	a.end(late)
	if v != remove {
		return nil
	}
	uninstall, cancel := context.WithTimeout(late, uninstallTimeout)
	defer cancel()
	return Uninstall(uninstall, a.opts)
}

// end waits for the loops to end.
func (a *Agent) end(ctx context.Context) {
	if !a.loops.wait(endTimeout) {
		a.log.Warn("parts of the agent have not ended in time")
	}
	a.watchers.wait(time.Second)
	a.relay.drain(ctx) // what the plugin has said until now
}

// serve starts the servers.
func (a *Agent) serve(ctx context.Context, cache, keeper *loop) {
	or := func(l *loop, check func() (bool, string)) func() (bool, string) {
		return func() (bool, string) {
			if err := l.failure(); err != nil {
				return false, err.Error()
			}
			return check()
		}
	}
	h := &health{loops: a.loops, conditions: []condition{
		{name: "netconf", check: a.config.condition},
		{name: "install", check: or(keeper, a.keeper.condition)},
		{name: "datapath", check: a.datapath.condition},
		{name: "pods", check: or(cache, func() (bool, string) {
			if !a.cache.Synced() {
				return false, "the node's pods have not been listed yet: the API server is asked"
			}
			return true, fmt.Sprintf("%d pods of node %s are known", len(a.cache.Pods()), a.opts.Node)
		})},
		{name: "redirection", check: a.sweeper.condition, told: true},
	}}
	a.metrics.registry.MustRegister(h)
	for _, s := range []struct {
		what, address string
		handler       func() http.Handler
	}{
		{"health", a.opts.HealthAddress, h.handler},
		{"metrics", a.opts.MetricsAddress, a.metrics.handler},
	} {
		if s.address == "" {
			continue
		}
		a.loops.startOther(ctx, s.what, func(ctx context.Context) error { return serve(ctx, a.log, s.what, s.address, s.handler()) })
	}
}

// Uninstall takes the plugin from the node. Pods that run keep their
// redirection.
func Uninstall(ctx context.Context, opts Options) error {
	// A runtime that reads the configuration anew for each DEL does not call the plugin
	// for a pod that ends when the entry is gone. What is left of those that have ended
	// would keep the plugin's binary on the node.
	newUpkeeper(configOf(opts), opts.RunDir, nil, opts.Log).sweepOnce(ctx)
	if err := install.Uninstall(ctx, opts.installOptions(nil)); err != nil {
		return fmt.Errorf("take the plugin from the node: %w", err)
	}
	opts.Log.Info("the plugin is gone from the node; pods that run keep their redirection")
	return nil
}
