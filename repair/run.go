// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"shunt.dev/shunt/internal/found"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/backends"
	"shunt.dev/shunt/redirect/iptables"
)

// What Run returns, beside 0.
const (
	exitFailed = 1
	exitUsage  = 2
)

// config is what the flags say.
type config struct {
	Options
	netconf, runDir, kubeconfig, logLevel string
	socket, proc                          string
	metricsAddress, healthAddress         string
}

// Run is `shunt-node repair`: it looks after the pods of a node until ctx ends,
// and returns the exit status.
func Run(ctx context.Context, args []string, stderr io.Writer) int {
	return run(ctx, args, stderr, os.Getenv, usualPace) //nolint:forbidigo // NODE_NAME is the default of --node
}

func run(ctx context.Context, args []string, stderr io.Writer, getenv func(string) string, p pace) int {
	c := config{Options: Options{pace: p}}
	f := flag.NewFlagSet("repair", flag.ContinueOnError)
	f.SetOutput(stderr)
	c.flags(f, getenv)
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return exitUsage // the flag set has said it
	}
	err := c.check(f.Args())
	if err == nil {
		c.Log, err = newLog(stderr, c.logLevel)
	}
	if err != nil {
		fmt.Fprintf(stderr, "shunt-node repair: %v\n", err)
		return exitUsage
	}
	if err := c.serve(ctx); err != nil {
		fmt.Fprintf(stderr, "shunt-node repair: %s\n", oneLine(err.Error()))
		return exitFailed
	}
	return 0
}

func (c *config) flags(f *flag.FlagSet, getenv func(string) string) {
	f.StringVar(&c.netconf, "netconf", "/etc/shunt/netconf.json", "the `file` with the plugin's network configuration")
	f.StringVar(&c.runDir, "run-dir", "", "the `directory` of records and locks; the netconf's runDir where not given")
	f.StringVar(&c.Node, "node", getenv("NODE_NAME"), "the node's `name`; $NODE_NAME where not given")
	f.StringVar(&c.kubeconfig, "kubeconfig", "", "the `file` that says how to reach the API server; empty: as a pod does")
	f.StringVar(&c.logLevel, "log-level", "info", "debug, info, warn, error, fatal or panic")
	f.BoolVar(&c.RepairPods, "repair-pods", true, "mend broken pods in place; goes before --delete-pods")
	f.BoolVar(&c.DeletePods, "delete-pods", true, "delete broken pods that are not to be mended, or can't be; goes before --label-pods")
	f.BoolVar(&c.LabelPods, "label-pods", true, "label broken pods")
	f.StringVar(&c.LabelKey, "broken-pod-label-key", "cni.istio.io/uninitialized", "the label's `key`")
	f.StringVar(&c.LabelValue, "broken-pod-label-value", "true", "the label's `value`")
	f.StringVar(&c.InitContainer, "init-container-name", "istio-validation", "the `name` of the init container whose exit code 126 counts")
	f.BoolVar(&c.RespectDisruptionBudgets, "respect-disruption-budgets", false, "evict rather than delete")
	f.StringVar(&c.socket, "cri-socket", "", "the container runtime's `socket`; empty: where runtimes usually have it")
	f.StringVar(&c.proc, "proc", "/proc", "the `directory` where the host's processes are to be seen")
	f.StringVar(&c.metricsAddress, "metrics-address", ":15015", "where /metrics is served; empty: nowhere")
	f.StringVar(&c.healthAddress, "health-address", ":8001", "where /healthz and /readyz are served; empty: nowhere")
}

func (c *config) check(rest []string) error {
	if len(rest) > 0 {
		return fmt.Errorf("%q: expected flags and nothing else", rest[0])
	}
	if c.Node == "" {
		return errors.New("--node (or $NODE_NAME): expected the name of this node")
	}
	if c.InitContainer == "" {
		return errors.New("--init-container-name: expected the name of an init container")
	}
	if why := validation.IsQualifiedName(c.LabelKey); len(why) > 0 {
		return fmt.Errorf("--broken-pod-label-key %q: expected the key of a label: %s", c.LabelKey, strings.Join(why, "; "))
	}
	if why := validation.IsValidLabelValue(c.LabelValue); len(why) > 0 {
		return fmt.Errorf("--broken-pod-label-value %q: expected the value of a label: %s", c.LabelValue, strings.Join(why, "; "))
	}
	for _, dir := range []struct{ flag, value string }{{"run-dir", c.runDir}, {"proc", c.proc}, {"cri-socket", strings.TrimPrefix(c.socket, "unix://")}} {
		if dir.value != "" && !filepath.IsAbs(dir.value) {
			return fmt.Errorf("--%s %q: expected an absolute path", dir.flag, dir.value)
		}
	}
	return nil
}

// logLevels are the configuration's, as slog has them.
var logLevels = map[string]slog.Level{
	"panic": slog.LevelError + 4, "fatal": slog.LevelError + 4,
	"error": slog.LevelError, "warn": slog.LevelWarn, "info": slog.LevelInfo, "debug": slog.LevelDebug,
}

func newLog(w io.Writer, level string) (*slog.Logger, error) {
	l, ok := logLevels[level]
	if !ok {
		return nil, fmt.Errorf("--log-level %q: expected debug, info, warn, error, fatal or panic", level)
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: l})), nil
}

// serve runs the controller, and serves what is asked of it.
func (c *config) serve(ctx context.Context) error {
	data, err := os.ReadFile(c.netconf)
	if err != nil {
		return fmt.Errorf("read the network configuration: %w", err)
	}
	conf, err := netconf.Parse(data)
	if err != nil {
		return fmt.Errorf("read the network configuration from %s: %w", c.netconf, err)
	}
	if c.runDir != "" {
		conf.RunDir = c.runDir
	}
	klog.SetSlogLogger(c.Log) // which is what client-go logs by
	if c.Client, err = c.apiServer(); err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	find := &finder{socket: c.socket, proc: c.proc, log: c.Log}
	defer find.close()
	if c.RepairPods { // without, the container has no run directory
		c.list = func(pods []redirect.PodRef) error { return found.Write(conf.RunDir, pods) }
	}
	control := newController(c.Options, &mender{
		conf: conf, log: c.Log, find: find,
		node: backends.New(backends.Options{
			BPFDir: conf.BPFDir, RunDir: conf.RunDir, Iptables: iptables.Mode(conf.IptablesBackend), Log: c.Log,
		}),
	}, newMetrics(registry))

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	health := http.NewServeMux()
	health.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	health.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !control.pods.Synced() {
			http.Error(w, "the node's pods are not known yet: is the API server there, and may it be asked?", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	metrics := http.NewServeMux()
	metrics.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	for _, s := range []struct {
		flag, at string
		mux      *http.ServeMux
	}{{"health-address", c.healthAddress, health}, {"metrics-address", c.metricsAddress, metrics}} {
		if s.at == "" {
			continue
		}
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", s.at)
		if err != nil {
			cancel(nil)
			return fmt.Errorf("--%s: %w", s.flag, err)
		}
		c.Log.Info("listening", "for", s.flag, "at", l.Addr())
		srv := &http.Server{Handler: s.mux, ReadHeaderTimeout: 10 * time.Second}
		wg.Go(func() {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				cancel(fmt.Errorf("--%s: %w", s.flag, err))
			}
		})
		defer srv.Close()
	}
	wg.Go(func() { c.watchNetconf(ctx, data, cancel) })
	c.Log.Info("looking after the node's pods", "node", c.Node, "initContainer", c.InitContainer, "modes", strings.Join(c.names(), " "))
	control.run(ctx)
	switch err := context.Cause(ctx); {
	case errors.Is(err, errNetconf):
		c.Log.Info(err.Error())
	case !errors.Is(err, context.Canceled):
		return err
	}
	return nil
}

// errNetconf ends the controller.
var errNetconf = errors.New("the network configuration has changed: to be started anew, with that")

// watchNetconf ends the controller when there is another valid netconf, for the
// kubelet to start it anew: by an old one it would mend pods that are to be left
// alone by now, or by a datapath that was given up.
func (c *config) watchNetconf(ctx context.Context, inForce []byte, end func(error)) {
	tick := time.NewTicker(c.pace.reread)
	defer tick.Stop()
	seen := inForce
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		data, err := os.ReadFile(c.netconf)
		if err != nil || bytes.Equal(data, seen) {
			continue // being replaced; or nothing new
		}
		seen = data
		if _, err := netconf.Parse(data); err != nil {
			c.Log.Error("the network configuration is refused, and the one before stays in force", "file", c.netconf, "error", err)
		} else if !bytes.Equal(data, inForce) {
			end(errNetconf)
			return
		}
	}
}

// apiServer connects to the API server, lazily.
func (c *config) apiServer() (kubernetes.Interface, error) {
	var conf *rest.Config
	var err error
	if c.kubeconfig == "" {
		if conf, err = rest.InClusterConfig(); err != nil {
			return nil, fmt.Errorf("find the API server as a pod does: %w (outside of a pod, give --kubeconfig)", err)
		}
	} else if conf, err = clientcmd.BuildConfigFromFlags("", c.kubeconfig); err != nil {
		return nil, fmt.Errorf("--kubeconfig: %w", err)
	}
	conf.UserAgent = "shunt-node repair"
	conf.QPS = -1 // the controller has limits of its own
	client, err := kubernetes.NewForConfig(conf)
	if err != nil {
		return nil, fmt.Errorf("make a client of the API server: %w", err)
	}
	return client, nil
}
