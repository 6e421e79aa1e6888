// SPDX-License-Identifier: Apache-2.0

// Package netconf reads the plugin's network configuration: what the CNI
// runtime writes to the plugin's standard input. It is strict. A key that is
// neither Shunt's nor the CNI specification's, a key given twice, a value of
// the wrong type or out of range is an error that names key, value and what
// was expected, for a misspelt key would otherwise leave its default in force.
//
// Every error is a *types.Error with the CNI code that the plugin exits with.
package netconf

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"shunt.dev/shunt/redirect"
)

// maxPodFactsTimeout bounds podFactsTimeout: kubelets give up on a sandbox
// long before.
const maxPodFactsTimeout = 10 * time.Minute

// Config is one network configuration with every default filled in.
type Config struct {
	CNIVersion string // empty when left out: an entry of a conflist
	Name       string // likewise
	Type       string

	// PrevResult is the result of the plugins before this one, byte for byte;
	// nil when there is none.
	PrevResult json.RawMessage

	// From runtimeConfig.
	CgroupPath     string            // the runtime's hint of the pod's cgroup
	PodAnnotations map[string]string // nil when the runtime passes none

	LogLevel   string // panic, fatal, error, warn, info or debug
	RunDir     string // absolute
	Kubeconfig string // absolute; RunDir/kubeconfig when left out
	BPFDir     string // absolute
	CgroupRoot string // absolute, or empty: find it

	Datapath        string // auto, ebpf or iptables
	InboundHook     string // auto, sk_lookup or tc
	IptablesBackend string // auto, nft or legacy
	PodFactsTimeout time.Duration

	// Redirect is what decides about pods: excludeNamespaces, proxy,
	// includeInboundPortsDefault and nativeRuntimeClasses. Its Agent is who
	// AgentArg names: the agent puts itself there when it installs.
	Redirect redirect.Config

	validAttachments json.RawMessage // cni.dev/valid-attachments
	oldAttachments   json.RawMessage // cni.dev/attachments, its name in libcni before the correction
}

// Default returns the configuration that `{"type": "shunt-cni"}` stands for.
func Default() *Config {
	return &Config{
		LogLevel:        "warn",
		RunDir:          "/run/shunt",
		Kubeconfig:      "/run/shunt/kubeconfig",
		BPFDir:          "/sys/fs/bpf/shunt",
		Datapath:        "auto",
		InboundHook:     "auto",
		IptablesBackend: "auto",
		PodFactsTimeout: 30 * time.Second,
		Redirect:        redirect.DefaultConfig(),
	}
}

// Parse reads a whole configuration. Its errors carry CNI code 6 where data is
// not a JSON object, and 7 where it is one that Shunt can't take.
func Parse(data []byte) (*Config, error) {
	c := Default()
	if err := c.parse(data, c.set); err != nil {
		return nil, err
	}
	if err := c.validate(); err != nil {
		return nil, err
	}
	return c, nil
}

// ParseForRemoval reads no more of a configuration than removal needs (the
// spec's own keys, logLevel, runDir and bpfDir), so that a pod which was set
// up can be taken down whatever has happened to the rest since: a key of
// another release, a value that somebody broke. Codes are those of Parse.
func ParseForRemoval(data []byte) (*Config, error) {
	c := Default()
	err := c.parse(data, func(key string, raw json.RawMessage) error {
		switch key {
		case "cniVersion", "name", "type", "logLevel", "runDir", "bpfDir":
			return c.set(key, raw)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := c.validate(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Config) parse(data []byte, set func(string, json.RawMessage) error) error {
	if err := checkSyntax(data); err != nil {
		return types.NewError(types.ErrDecodingFailure, "parse network configuration: "+err.Error(), "")
	}
	kubeconfigGiven := false
	err := eachKey("", data, func(key string, raw json.RawMessage) error {
		kubeconfigGiven = kubeconfigGiven || key == "kubeconfig"
		return set(key, raw)
	})
	if err != nil {
		return invalid(err)
	}
	if !kubeconfigGiven {
		c.Kubeconfig = path.Join(c.RunDir, "kubeconfig")
	}
	return nil
}

func invalid(err error) error {
	return types.NewError(types.ErrInvalidNetworkConfig, "parse network configuration: "+err.Error(), "")
}

// checkSyntax fails where data is not one JSON object and nothing else.
func checkSyntax(data []byte) error {
	var raw json.RawMessage
	if err := json.Unmarshal(data, &raw); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			return fmt.Errorf("decode JSON at byte %d: %w", syntax.Offset, err)
		}
		return fmt.Errorf("decode JSON: %w", err)
	}
	if kindOf(raw) != '{' {
		return fmt.Errorf("decode JSON: %s is not an object", quote(raw))
	}
	return nil
}

// ownKeys are the contract's keys, to tell a miswritten one what it may mean.
var ownKeys = [...]string{
	"logLevel", "runDir", "kubeconfig", "bpfDir", "cgroupRoot", "excludeNamespaces", "datapath", "inboundHook",
	"iptablesBackend", "includeInboundPortsDefault", "nativeRuntimeClasses", "podFactsTimeout", "proxy",
	"cniVersion", "name", "type", "capabilities", "runtimeConfig", "prevResult", "args", "dns", "ipam",
}

// set stores one key of the configuration.
func (c *Config) set(key string, raw json.RawMessage) (err error) {
	switch key {
	case "cniVersion":
		c.CNIVersion, err = oneOf(key, raw, "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
	case "name":
		c.Name, err = nonEmpty(key, raw)
	case "type":
		c.Type, err = nonEmpty(key, raw)
	case "capabilities":
		err = eachIn(key, raw, func(sub string, raw json.RawMessage) error {
			var b bool
			return scan(sub, raw, &b, "true or false")
		})
	case "runtimeConfig":
		err = eachIn(key, raw, c.setRuntime)
	case "prevResult":
		if kindOf(raw) != 'n' {
			c.PrevResult = raw
		}
	case "dns", "ipam":
		// The specification's, and of no meaning to a plugin that hands on
		// what others made.
	case "args":
		if kindOf(raw) == '{' {
			err = eachIn(key, raw, c.setArg)
		}
	case "logLevel":
		c.LogLevel, err = oneOf(key, raw, "panic", "fatal", "error", "warn", "info", "debug")
	case "runDir":
		c.RunDir, err = absolute(key, raw)
	case "kubeconfig":
		c.Kubeconfig, err = absolute(key, raw)
	case "bpfDir":
		c.BPFDir, err = absolute(key, raw)
	case "cgroupRoot":
		if string(raw) == `""` {
			c.CgroupRoot = ""
			return nil
		}
		c.CgroupRoot, err = absolute(key, raw)
	case "excludeNamespaces":
		c.Redirect.ExcludeNamespaces, err = names(key, raw, isLabel, "a namespace name")
	case "datapath":
		c.Datapath, err = oneOf(key, raw, "auto", "ebpf", "iptables")
	case "inboundHook":
		c.InboundHook, err = oneOf(key, raw, "auto", "sk_lookup", "tc")
	case "iptablesBackend":
		c.IptablesBackend, err = oneOf(key, raw, "auto", "nft", "legacy")
	case "includeInboundPortsDefault":
		c.Redirect.IncludeInboundPortsDefault, err = oneOf(key, raw, redirect.InboundContainerPorts, redirect.InboundAll)
	case "nativeRuntimeClasses":
		c.Redirect.NativeRuntimeClasses, err = names(key, raw, isSubdomain, "a RuntimeClass name")
	case "podFactsTimeout":
		c.PodFactsTimeout, err = timeout(key, raw)
	case "proxy":
		err = eachIn(key, raw, c.setProxy)
	case "cni.dev/valid-attachments":
		c.validAttachments = raw
	case "cni.dev/attachments":
		c.oldAttachments = raw
	default:
		if strings.HasPrefix(key, "cni.dev/") {
			return nil
		}
		return unknown(key, raw, ownKeys[:])
	}
	return err
}

// AgentArg is the member of args, the specification's key for what has no key of
// its own, that names the node agent's DaemonSet as namespace/name (P4). RunDir
// knows it too, but is empty after a reboot, and the agent's own pod must start
// then, when there is nobody yet to ask about pods.
const AgentArg = "shunt.dev/agent"

// setArg stores one key of args. The others are not Shunt's.
func (c *Config) setArg(key string, raw json.RawMessage) error {
	if key != "args."+AgentArg {
		return nil
	}
	s, err := text(key, raw)
	agent, ok := redirect.ParseAgentRef(s)
	if err != nil || !ok {
		return mismatch(key, raw, `a DaemonSet's "namespace/name"`)
	}
	c.Redirect.Agent = agent
	return nil
}

// setRuntime stores one key of runtimeConfig. What other capabilities bring is
// not Shunt's, and is no error.
func (c *Config) setRuntime(key string, raw json.RawMessage) (err error) {
	switch strings.TrimPrefix(key, "runtimeConfig.") {
	case "cgroupPath":
		c.CgroupPath, err = text(key, raw)
	case "io.kubernetes.cri.pod-annotations":
		if kindOf(raw) == 'n' { // a Go runtime's nil map: a pod without annotations
			return nil
		}
		c.PodAnnotations = map[string]string{}
		err = eachIn(key, raw, func(sub string, raw json.RawMessage) error {
			v, err := text(sub, raw)
			c.PodAnnotations[strings.TrimPrefix(sub, key+".")] = v
			return err
		})
	}
	return err
}

var proxyKeys = [...]string{
	"proxy.containerName", "proxy.uid", "proxy.gid", "proxy.outboundPort", "proxy.inboundPort",
	"proxy.tunnelPort", "proxy.dnsPort", "proxy.excludeInboundPorts",
}

// maxID is the highest uid or gid: the one above means "no id" to the kernel.
const maxID = 1<<32 - 2

// setProxy stores one key of the proxy object.
func (c *Config) setProxy(key string, raw json.RawMessage) (err error) {
	r, p := &c.Redirect, &c.Redirect.Proxy
	switch key {
	case "proxy.containerName":
		if r.ProxyContainer, err = text(key, raw); err == nil && !isLabel(r.ProxyContainer) {
			err = mismatch(key, raw, "a container name")
		}
	case "proxy.uid":
		p.UID, err = integer[uint32](key, raw, maxID)
	case "proxy.gid":
		p.GID, err = integer[uint32](key, raw, maxID)
	case "proxy.outboundPort":
		p.OutboundPort, err = integer[uint16](key, raw, 65535)
	case "proxy.inboundPort":
		p.InboundPort, err = integer[uint16](key, raw, 65535)
	case "proxy.tunnelPort":
		p.TunnelPort, err = integer[uint16](key, raw, 65535)
	case "proxy.dnsPort":
		p.DNSPort, err = integer[uint16](key, raw, 65535)
	case "proxy.excludeInboundPorts":
		r.ProxyExcludeInboundPorts = nil
		err = eachItem(key, raw, "an array of ports", func(item string, raw json.RawMessage) error {
			port, err := integer[uint16](item, raw, 65535)
			r.ProxyExcludeInboundPorts = append(r.ProxyExcludeInboundPorts, port)
			return err
		})
	default:
		err = unknown(key, raw, proxyKeys[:])
	}
	return err
}

// validate checks what can't be told from one key alone.
func (c *Config) validate() error {
	if c.Type == "" {
		return invalid(errors.New(`type is missing: expected the plugin's name, "shunt-cni"`))
	}
	p := &c.Redirect.Proxy
	ports := [...]struct {
		key  string
		port uint16
	}{
		{"proxy.outboundPort", p.OutboundPort},
		{"proxy.inboundPort", p.InboundPort},
		{"proxy.tunnelPort", p.TunnelPort},
		{"proxy.dnsPort", p.DNSPort},
	}
	for i, a := range ports {
		for _, b := range ports[:i] {
			if a.port == b.port {
				return invalid(fmt.Errorf("%s: %d is not a port of its own: %s has it too", a.key, a.port, b.key))
			}
		}
	}
	return nil
}

// ValidAttachments returns the attachments that GC must keep. Its errors are
// of code 7: a list that is missing or can't be read must not be taken for an
// empty one, by which every pod of the node would lose its redirection.
func (c *Config) ValidAttachments() ([]redirect.Attachment, error) {
	key, raw := "cni.dev/valid-attachments", c.validAttachments
	if raw == nil {
		key, raw = "cni.dev/attachments", c.oldAttachments
	}
	if raw == nil {
		return nil, invalid(errors.New("cni.dev/valid-attachments is missing: GC needs the list of attachments to keep"))
	}
	if kindOf(raw) == 'n' { // how libcni writes a list without members
		return nil, nil
	}
	var out []redirect.Attachment
	err := eachItem(key, raw, "an array of attachments", func(item string, raw json.RawMessage) error {
		var a redirect.Attachment
		err := eachIn(item, raw, func(sub string, raw json.RawMessage) (err error) {
			switch strings.TrimPrefix(sub, item+".") {
			case "containerID":
				a.ContainerID, err = nonEmpty(sub, raw)
			case "ifname":
				a.IfName, err = nonEmpty(sub, raw)
			}
			return err
		})
		if err == nil && (a.ContainerID == "" || a.IfName == "") {
			err = mismatch(item, raw, "an object with containerID and ifname")
		}
		out = append(out, a)
		return err
	})
	if err != nil {
		return nil, invalid(err)
	}
	return out, nil
}
