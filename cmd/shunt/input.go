// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"

	"github.com/spf13/cobra"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/internal/podfile"
	"shunt.dev/shunt/redirect"
)

// input is what the verbs read: a pod, and the node's configuration.
type input struct {
	podPath, confPath string
}

func (in *input) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&in.podPath, "pod", "", "the `FILE` of a Pod, YAML or JSON; - is standard input")
	cmd.Flags().StringVar(&in.confPath, "netconf", "", "the plugin's configuration or the conflist that has it, a `FILE`; defaults without one")
}

// A subject is a pod, and what the rules of section 1 say of it.
type subject struct {
	*podfile.File
	conf    *netconf.Config
	outcome redirect.Outcome
	// policy and choice are those of a pod that is redirected: !outcome.Skip.
	policy  *redirect.Policy
	choice  redirect.Choice
	assumed []string // what the file does not say
}

func (s *subject) name() string { return s.Pod.Namespace + "/" + s.Pod.Name }

// read reads pod and configuration and decides about the pod. Its errors are
// the caller's to mend, and are marked so.
func (in *input) read(cmd *cobra.Command) (*subject, error) {
	if in.podPath == "" {
		return nil, usagef("--pod is missing: give the FILE of a Pod, or - for standard input")
	}
	conf, err := readConf(in.confPath, netconf.Parse)
	if err != nil {
		return nil, err
	}
	file, err := readPod(in.podPath, cmd.InOrStdin())
	if err != nil {
		return nil, err
	}
	s := &subject{File: file, conf: conf}
	pod := file.Pod
	if pod.Namespace == "" {
		pod.Namespace = "default"
		s.assumed = append(s.assumed, "the pod's namespace is default: its file names none")
	}
	if pod.Name == "" {
		pod.Name = "unnamed"
		s.assumed = append(s.assumed, "the pod is called unnamed: its file names it not")
	}
	var early bool
	if s.outcome, early = conf.Redirect.Early(pod.Namespace, pod.Name); early {
		return s, nil
	}
	s.outcome, s.policy, err = conf.Redirect.Evaluate(pod)
	if err != nil {
		return nil, usagef("%s: pod %s can't start (%s): %w", in.podName(), s.name(), s.outcome.Rule, err)
	}
	if s.outcome.Skip {
		return s, nil
	}
	if s.choice, err = redirect.Choose(conf.Datapath, conf.InboundHook, pod, s.policy); err != nil {
		return nil, usagef("%s: pod %s can't start: choose a datapath: %w", in.podName(), s.name(), err)
	}
	return s, nil
}

func (in *input) podName() string {
	if in.podPath == "-" {
		return "standard input"
	}
	return in.podPath
}

func readPod(path string, stdin io.Reader) (*podfile.File, error) {
	if path == "-" {
		f, err := podfile.Read(stdin)
		if err != nil {
			return nil, usagef("read the pod from standard input: %w", err)
		}
		return f, nil
	}
	r, err := os.Open(path)
	if err != nil {
		return nil, usagef("read the pod: %w", err)
	}
	defer r.Close()
	f, err := podfile.Read(r)
	if err != nil {
		return nil, usagef("read the pod from %s: %w", path, err)
	}
	return f, nil
}

// maxConf bounds a network configuration, in bytes.
const maxConf = 1 << 20

// readConf reads the plugin's configuration, by itself or out of a conflist.
func readConf(path string, parse func([]byte) (*netconf.Config, error)) (*netconf.Config, error) {
	if path == "" {
		return netconf.Default(), nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, usagef("read the network configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConf+1))
	if err == nil && len(data) > maxConf {
		err = fmt.Errorf("it is longer than %d MiB", maxConf>>20)
	}
	if err == nil {
		data, err = ownEntry(data)
	}
	var conf *netconf.Config
	if err == nil {
		conf, err = parse(data)
	}
	if err != nil {
		return nil, usagef("read the network configuration from %s: %w", path, err)
	}
	return conf, nil
}

// pluginType is the plugin's name, by which a runtime finds its binary.
const pluginType = "shunt-cni"

// ownEntry gives the plugin's entry of a conflist; what is no conflist, as it
// is.
func ownEntry(data []byte) ([]byte, error) {
	var list struct {
		Type    string            `json:"type"`
		Plugins []json.RawMessage `json:"plugins"`
	}
	// What is no JSON, the parser says better.
	if json.Unmarshal(data, &list) != nil || list.Plugins == nil {
		if list.Type != "" && list.Type != pluginType {
			return nil, fmt.Errorf("it is of type %q: expected %q, or a conflist with an entry of that type", list.Type, pluginType)
		}
		return data, nil
	}
	var own []json.RawMessage
	for _, entry := range list.Plugins {
		var p struct {
			Type string `json:"type"`
		}
		if json.Unmarshal(entry, &p) == nil && p.Type == pluginType {
			own = append(own, entry)
		}
	}
	if len(own) != 1 {
		return nil, fmt.Errorf("%d of its %d plugins are of type %q: expected one", len(own), len(list.Plugins), pluginType)
	}
	return own[0], nil
}

// parseAddr reads an address of a flag.
func parseAddr(flag, s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return a, usagef("%s %q: expected an IP address", flag, s)
	}
	return a, nil
}
