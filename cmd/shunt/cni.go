// SPDX-License-Identifier: Apache-2.0

package main

import (
	"log/slog"
	"os"

	"shunt.dev/shunt/internal/cni"
	"shunt.dev/shunt/internal/cni/whole"
	"shunt.dev/shunt/internal/handover"
	"shunt.dev/shunt/internal/kubeapi"
	"shunt.dev/shunt/internal/netconf"
)

// isPlugin reports whether the plugin has become this process, by its arguments: it
// has handed a request over. That is no verb for people.
func isPlugin(args []string) bool { return len(args) == 3 && args[1] == handover.Verb }

// servePlugin serves that request. Signals do what they do to the plugin.
func servePlugin(why handover.Reason) {
	path := os.Getenv("PATH") //nolint:forbidigo // where the runtime says that programs are
	cni.Main(cni.Options{
		Version: buildVersion,
		Facts: func(conf *netconf.Config, log *slog.Logger) cni.FactsSource {
			return whole.Facts(conf, log, buildVersion, why == handover.HungAgent)
		},
		Backends: func(conf *netconf.Config, log *slog.Logger) cni.Node {
			return whole.Backends(conf, log, path)
		},
		CheckKubeconfig: kubeapi.CheckConfig,
	})
}
