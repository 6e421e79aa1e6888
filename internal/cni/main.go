// SPDX-License-Identifier: Apache-2.0

// Package cni is the CNI plugin: chained after the plugins that make a pod's network,
// it programs the redirection of the pod's TCP traffic to its sidecar proxy.
//
// It is two executables. shunt-cni, which the runtime starts for each pod, is small
// and quick: it does by itself what nearly every pod of a node that is up needs (the
// facts by the node agent, and eBPF with the programs loaded), and hands everything
// else over to the larger one: see package handover.
package cni

import (
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"

	"shunt.dev/shunt/internal/netconf"
)

// specVersions are the versions of the CNI specification that are served.
var specVersions = version.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

// Options are what the larger executable has, and the small one has not.
type Options struct {
	Version  string // of the build
	Facts    func(*netconf.Config, *slog.Logger) FactsSource
	Backends func(*netconf.Config, *slog.Logger) Node
	// CheckKubeconfig fails where the API server could not even be asked.
	CheckKubeconfig func(path string) error
}

// Main serves one request with all that it may need, and ends the process where that
// fails.
func Main(o Options) { serve(newPlugin(o).funcs(), o.Version) }

// serve serves one request: what is asked for is in the environment and on standard
// input.
func serve(funcs skel.CNIFuncs, build string) {
	// It lives for some milliseconds and allocates about as many megabytes:
	// collecting garbage would only cost time, until there is really much.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(256 << 20)
	growStack(false)

	// skel compares the pod's netns with the plugin's after ADD has returned
	// and printed its result, and would print an error behind it. The plugin
	// refuses the host's netns itself, before anything is written, whatever
	// this variable says; so skel's own look only costs time.
	_ = os.Setenv("CNI_NETNS_OVERRIDE", "1") // fails on malformed names only

	if e := skel.PluginMainFuncsWithError(funcs, specVersions, about(build)); e != nil {
		if err := e.Print(); err != nil {
			fmt.Fprintln(os.Stderr, "print the error:", err)
		}
		os.Exit(1)
	}
}

// about is what is told to who runs the plugin by hand.
func about(build string) string {
	return "CNI plugin shunt-cni " + build + `

The container runtime runs it, last in the chain of plugins that make a pod's network:
what is to be done is in CNI_COMMAND and its like, the network configuration on standard
input. To do its work by hand, or to ask what it does with a pod and why, run shunt.
`
}

// growStack lets the stack grow once, while there is little on it, in place of
// five times on the way down into TLS and JSON, copying all of it each time. The
// frame is made room for whether it is used or not; used, each of its pages would
// be had from the kernel at once.
//
//go:noinline
func growStack(use bool) {
	if use {
		var room [64 << 10]byte
		runtime.KeepAlive(&room)
	}
}
