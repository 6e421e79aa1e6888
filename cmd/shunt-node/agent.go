// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"shunt.dev/shunt/install"
	"shunt.dev/shunt/internal/agent"
)

// agentFlags are the flags of agent, and those of uninstall among them.
type agentFlags struct {
	agent.Options
	kubeconfig, logLevel string
}

// paths adds the flags that say where the plugin lies on the node, and whose it
// is: all that agent and uninstall may both be given.
func (f *agentFlags) paths(flags *flag.FlagSet, getenv func(string) string) {
	flags.StringVar(&f.BinDir, "cni-bin-dir", "/host/opt/cni/bin", "the container runtime's `directory` of CNI plugins")
	flags.StringVar(&f.ConfDir, "cni-conf-dir", "/host/etc/cni/net.d", "the container runtime's `directory` of CNI configurations")
	flags.StringVar(&f.ConfFile, "cni-conf-file-name", "", "the `file` in it to join or write; empty: the first, as the runtime takes them")
	flags.BoolVar(&f.Chained, "chained", true, "join the configuration of others; false: write one of the plugin's own")
	flags.StringVar(&f.RunDir, "run-dir", "/run/shunt", "the `directory` of socket, kubeconfig and state: the netconf's runDir, as the node has it")
	flags.StringVar(&f.BinariesDir, "binaries-dir", "/opt/shunt/bin", "the `directory` that the plugin's binaries are copied from")
	flags.StringVar(&f.CacheDir, "cni-cache-dir", "/host/var/lib/cni", "the container runtime's `directory` of CNI results, by which uninstall tells whether a pod still needs the plugin's binary")
	flags.StringVar(&f.DaemonSet, "daemonset", "shunt-node", "the `name` of the agent's DaemonSet")
	flags.StringVar(&f.Namespace, "namespace", getenv("POD_NAMESPACE"), "the `namespace` of the agent's DaemonSet; $POD_NAMESPACE where not given")
	flags.StringVar(&f.logLevel, "log-level", "info", "of the agent's own lines: debug, info, warn, error, fatal or panic")
}

// check fails unless what has no default was given.
func (f *agentFlags) check() error {
	for _, need := range []struct{ flag, value string }{
		{"cni-bin-dir", f.BinDir},
		{"cni-conf-dir", f.ConfDir},
		{"run-dir", f.RunDir},
		{"binaries-dir", f.BinariesDir},
	} {
		if !filepath.IsAbs(need.value) {
			return fmt.Errorf("--%s: %q is not an absolute path", need.flag, need.value)
		}
	}
	return nil
}

func runAgent(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) int {
	var f agentFlags
	flags := flag.NewFlagSet("agent", flag.ContinueOnError)
	f.paths(flags, getenv)
	flags.StringVar(&f.Netconf, "netconf", "/etc/shunt/netconf.json", "the `file` with the plugin's network configuration")
	flags.StringVar(&f.Node, "node", getenv("NODE_NAME"), "the node's `name`; $NODE_NAME where not given")
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "the `file` that says how to reach the API server; empty: as a pod does")
	flags.StringVar(&f.MetricsAddress, "metrics-address", ":15014", "where /metrics is served; empty: nowhere")
	flags.StringVar(&f.HealthAddress, "health-address", ":8000", "where /healthz and /readyz are served; empty: nowhere")
	if exit, done := parse(flags, args, stderr); done {
		return exit
	}
	err := f.check()
	switch {
	case err != nil:
	case f.Namespace == "" || f.DaemonSet == "":
		err = errors.New("--namespace (or $POD_NAMESPACE) and --daemonset: expected those of the agent's DaemonSet")
	case f.Node == "":
		err = errors.New("--node (or $NODE_NAME): expected the name of this node")
	}
	if err != nil {
		return fail(stderr, "agent", exitUsage, err)
	}
	if f.Log, err = newLog(stderr, f.logLevel); err != nil {
		return fail(stderr, "agent", exitUsage, err)
	}
	klog.SetSlogLogger(slog.New(quiet{f.Log.Handler()}))
	api, err := apiServer(f.kubeconfig)
	if err != nil {
		return fail(stderr, "agent", exitFailed, err)
	}
	if f.Kubeconfig, err = pluginKubeconfig(api, f.RunDir); err != nil {
		return fail(stderr, "agent", exitFailed, err)
	}
	if f.Client, err = kubernetes.NewForConfig(api); err != nil {
		return fail(stderr, "agent", exitFailed, fmt.Errorf("make a client of the API server: %w", err))
	}
	f.Log.Info("the node agent starts", "version", buildVersion, "node", f.Node, "daemonset", f.Namespace+"/"+f.DaemonSet, "apiServer", api.Host)
	a, err := agent.New(f.Options)
	if err == nil {
		err = a.Run(ctx)
	}
	if err != nil {
		return fail(stderr, "agent", exitFailed, err)
	}
	return 0
}

func runUninstall(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) int {
	var f agentFlags
	flags := flag.NewFlagSet("uninstall", flag.ContinueOnError)
	f.paths(flags, getenv)
	if exit, done := parse(flags, args, stderr); done {
		return exit
	}
	f.Kubeconfig.Path = kubeconfigPath(f.RunDir)
	err := f.check()
	if err == nil {
		f.Log, err = newLog(stderr, f.logLevel)
	}
	if err != nil {
		return fail(stderr, "uninstall", exitUsage, err)
	}
	if err := agent.Uninstall(ctx, f.Options); err != nil {
		return fail(stderr, "uninstall", exitFailed, err)
	}
	return 0
}

// apiServer says how the API server is reached.
func apiServer(kubeconfig string) (c *rest.Config, err error) {
	if kubeconfig == "" {
		if c, err = rest.InClusterConfig(); err != nil {
			return nil, fmt.Errorf("find the API server as a pod does: %w (outside of a pod, give --kubeconfig)", err)
		}
	} else if c, err = clientcmd.BuildConfigFromFlags("", kubeconfig); err != nil {
		return nil, fmt.Errorf("--kubeconfig: %w", err)
	}
	c.UserAgent = "shunt-node/" + buildVersion
	// All pods of a node may start at once, and each may have to be got live.
	c.QPS, c.Burst = 50, 200
	return c, nil
}

func kubeconfigPath(runDir string) string { return filepath.Join(runDir, "kubeconfig") }

// pluginKubeconfig says what the plugin's kubeconfig is to be made of: it
// reaches the API server as the agent does.
func pluginKubeconfig(c *rest.Config, runDir string) (install.KubeconfigOptions, error) {
	k := install.KubeconfigOptions{
		Path: kubeconfigPath(runDir), Server: c.Host,
		CAFile: c.CAFile, TokenFile: c.BearerTokenFile, TLSServerName: c.ServerName, Insecure: c.Insecure,
	}
	if k.TokenFile == "" || k.CAFile == "" && !k.Insecure {
		return k, errors.New("--kubeconfig: expected a user with tokenFile, and a cluster with certificate-authority: " +
			"the plugin's kubeconfig is made of these files, and made anew when they change")
	}
	return k, nil
}
