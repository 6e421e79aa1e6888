// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Environment that steers how the plugin is built.
const (
	// PluginEnv names a plugin that is built already, both executables in one
	// directory, for machines without a Go toolchain.
	PluginEnv = "SHUNT_TESTBED_PLUGIN"
	// RaceEnv, if not empty, builds the plugin with the race detector.
	RaceEnv = "SHUNT_TESTBED_RACE"
)

var plugin struct {
	once sync.Once
	path string
	err  error
}

// BuildPlugin builds the plugin, once a process, and gives the path of the
// executable that runtimes start, cmd/shunt-cni. The larger one, cmd/shunt, lies
// beside it. [PluginEnv] and [RaceEnv] steer it.
func BuildPlugin(t testing.TB) string {
	t.Helper()
	plugin.once.Do(func() { plugin.path, plugin.err = buildPlugin() })
	if plugin.err != nil {
		t.Fatalf("build the plugin: %v", plugin.err)
	}
	return plugin.path
}

func buildPlugin() (string, error) {
	if path := os.Getenv(PluginEnv); path != "" {
		return path, nil
	}
	race := os.Getenv(RaceEnv) != ""
	if _, err := BuildCommand("shunt.dev/shunt/cmd/shunt", race); err != nil {
		return "", err
	}
	return BuildCommand("shunt.dev/shunt/cmd/shunt-cni", race)
}

// BuildCommand builds a main package of this module into a directory that
// lives as long as the test process, and gives the binary's path.
func BuildCommand(pkg string, race bool) (string, error) {
	dir, err := processDir()
	if err != nil {
		return "", err
	}
	out := filepath.Join(dir, filepath.Base(pkg))
	args := []string{"build", "-trimpath", "-o", out}
	cgo := "CGO_ENABLED=0"
	if race {
		args, cgo = append(args, "-race"), "CGO_ENABLED=1"
	}
	cmd := exec.Command("go", append(args, pkg)...)
	cmd.Env = append(os.Environ(), cgo)
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%q: %w\n%s", cmd.Args, err, b)
	}
	return out, nil
}

// CNI runs the plugin as a container runtime does.
type CNI struct {
	Plugin     string // the binary
	CNIVersion string
	RunDir     string
	BPFDir     string // on a bpffs of the test's own
	Kubeconfig string // "" = none is named
	// PluginCgroupRoot is the configuration's cgroupRoot; "" = not given.
	PluginCgroupRoot string
	// Config has further keys of the plugin's configuration, or other values
	// for those that are given anyway; a nil value leaves the key out.
	Config  map[string]any
	Env     []string      // added to the plugin's environment
	Timeout time.Duration // of one run; 0 = 1 min
}

// NewCNI builds the plugin and gives it directories of its own. The pod cgroup
// is told by runtimeConfig.cgroupPath; see [Invocation].
func NewCNI(t testing.TB) *CNI {
	t.Helper()
	return &CNI{
		Plugin:     BuildPlugin(t),
		CNIVersion: "1.1.0",
		RunDir:     t.TempDir(),
		BPFDir:     filepath.Join(BPFFS(t), "shunt"),
	}
}

// Invocation is one run of the plugin, as an override sees it.
type Invocation struct {
	Command     string
	ContainerID string
	Netns       string
	IfName      string
	Path        string
	// Args are those of CNI_ARGS, in any order.
	Args map[string]string
	// Config is the network configuration. It has cniVersion, name, type,
	// runDir, bpfDir, what [CNI] says, runtimeConfig.cgroupPath, and for ADD
	// and CHECK a prevResult.
	Config map[string]any
	// Stdin takes the place of Config where it is not nil.
	Stdin []byte
	Env   []string
}

// Override changes a run of the plugin.
type Override func(*Invocation)

// Set sets a key of the network configuration.
func Set(key string, value any) Override {
	return func(i *Invocation) { i.Config[key] = value }
}

// Unset leaves a key of the network configuration out.
func Unset(key string) Override { return func(i *Invocation) { delete(i.Config, key) } }

// Stdin gives the plugin these bytes in place of a network configuration.
func Stdin(b []byte) Override { return func(i *Invocation) { i.Stdin = b } }

// Arg sets a key of CNI_ARGS.
func Arg(key, value string) Override { return func(i *Invocation) { i.Args[key] = value } }

// NoArg leaves a key of CNI_ARGS out.
func NoArg(key string) Override { return func(i *Invocation) { delete(i.Args, key) } }

// LateDel is how the kubelet repeats a DEL: no namespace, no prevResult.
func LateDel() Override {
	return func(i *Invocation) {
		i.Netns = ""
		delete(i.Config, "prevResult")
	}
}

// CNIError is the error object that a plugin prints.
type CNIError struct {
	CNIVersion string `json:"cniVersion"`
	Code       uint   `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details"`
}

func (e *CNIError) Error() string {
	return strings.TrimSuffix(fmt.Sprintf("CNI error %d: %s: %s", e.Code, e.Msg, e.Details), ": ")
}

// CNIResult is the outcome of a run.
type CNIResult struct {
	ExitCode int // -1 if a signal ended it, such as by TimedOut
	TimedOut bool
	Stdout   []byte
	Stderr   []byte
	// Err is what an unsuccessful plugin printed; nil where it printed
	// something else.
	Err     *CNIError
	Elapsed time.Duration // from fork to exit
	CPU     time.Duration // user and system, of the plugin and its children
}

// OK says whether the run succeeded.
func (r CNIResult) OK() bool { return r.ExitCode == 0 && !r.TimedOut }

// Code gives the CNI error code, 0 where there is none.
func (r CNIResult) Code() uint {
	if r.Err == nil {
		return 0
	}
	return r.Err.Code
}

func (r CNIResult) String() string {
	return fmt.Sprintf("exit %d (timed out: %v) after %v\nstdout: %s\nstderr: %s", r.ExitCode, r.TimedOut, r.Elapsed, r.Stdout, r.Stderr)
}

// Add runs ADD for a pod.
func (c *CNI) Add(t testing.TB, p *Pod, o ...Override) CNIResult {
	t.Helper()
	return c.Run(t, "ADD", p, o...)
}

// Del runs DEL for a pod.
func (c *CNI) Del(t testing.TB, p *Pod, o ...Override) CNIResult {
	t.Helper()
	return c.Run(t, "DEL", p, o...)
}

// Check runs CHECK for a pod.
func (c *CNI) Check(t testing.TB, p *Pod, o ...Override) CNIResult {
	t.Helper()
	return c.Run(t, "CHECK", p, o...)
}

// MustAdd is Add that ends the test if the plugin fails.
func (c *CNI) MustAdd(t testing.TB, p *Pod, o ...Override) CNIResult {
	t.Helper()
	return must(t, "ADD", c.Add(t, p, o...))
}

// MustDel is Del that ends the test if the plugin fails.
func (c *CNI) MustDel(t testing.TB, p *Pod, o ...Override) CNIResult {
	t.Helper()
	return must(t, "DEL", c.Del(t, p, o...))
}

// MustCheck is Check that ends the test if the plugin fails.
func (c *CNI) MustCheck(t testing.TB, p *Pod, o ...Override) CNIResult {
	t.Helper()
	return must(t, "CHECK", c.Check(t, p, o...))
}

func must(t testing.TB, command string, r CNIResult) CNIResult {
	t.Helper()
	if !r.OK() {
		t.Fatalf("%s failed: %s", command, r)
	}
	return r
}

// Run runs any command of the CNI specification. p may be nil for those that
// are not about a pod: VERSION, STATUS, GC.
func (c *CNI) Run(t testing.TB, command string, p *Pod, overrides ...Override) CNIResult {
	t.Helper()
	r, err := c.Exec(command, p, overrides...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Exec is Run for other goroutines than the test's. The error is not the
// plugin's, but that it could not be run.
func (c *CNI) Exec(command string, p *Pod, overrides ...Override) (CNIResult, error) {
	i := c.invocation(command, p)
	for _, o := range overrides {
		o(i)
	}
	if i.Stdin == nil {
		b, err := json.Marshal(i.Config)
		if err != nil {
			return CNIResult{}, fmt.Errorf("write network configuration: %w", err)
		}
		i.Stdin = b
	}
	limit := c.Timeout
	if limit == 0 {
		limit = time.Minute
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, c.Plugin)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(i.Stdin), &stdout, &stderr
	cmd.Env = i.environ()
	cmd.WaitDelay = 2 * time.Second
	start := time.Now()
	err := cmd.Run()
	r := CNIResult{Elapsed: time.Since(start), TimedOut: ctx.Err() != nil, Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}
	if s := cmd.ProcessState; s != nil {
		r.CPU = s.UserTime() + s.SystemTime()
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit), r.TimedOut && cmd.ProcessState != nil:
		r.ExitCode = cmd.ProcessState.ExitCode()
	default:
		return r, fmt.Errorf("run %s: %w", c.Plugin, err)
	}
	if r.ExitCode != 0 {
		r.Err = parseCNIError(r.Stdout)
	}
	return r, nil
}

// parseCNIError gives the error object if stdout is exactly one, else nil.
func parseCNIError(stdout []byte) *CNIError {
	e := new(CNIError)
	d := json.NewDecoder(bytes.NewReader(stdout))
	if err := d.Decode(e); err != nil || e.Code == 0 {
		return nil
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil
	}
	return e
}

// invocation is the run that a runtime would make.
func (c *CNI) invocation(command string, p *Pod) *Invocation {
	i := &Invocation{
		Command: command, IfName: "eth0", Path: filepath.Dir(c.Plugin),
		Args: map[string]string{}, Env: append([]string(nil), c.Env...),
		Config: map[string]any{
			"cniVersion":   c.CNIVersion,
			"name":         "shunt-test",
			"type":         "shunt-cni",
			"capabilities": map[string]any{"cgroupPath": true, "io.kubernetes.cri.pod-annotations": true},
			"runDir":       c.RunDir,
			"bpfDir":       c.BPFDir,
		},
	}
	if c.Kubeconfig != "" {
		i.Config["kubeconfig"] = c.Kubeconfig
	}
	if c.PluginCgroupRoot != "" {
		i.Config["cgroupRoot"] = c.PluginCgroupRoot
	}
	if p != nil {
		i.ContainerID, i.Netns = p.ContainerID, p.NetnsPath()
		i.Args = map[string]string{
			"IgnoreUnknown":              "1",
			"K8S_POD_NAMESPACE":          p.Namespace,
			"K8S_POD_NAME":               p.Name,
			"K8S_POD_INFRA_CONTAINER_ID": p.ContainerID,
			"K8S_POD_UID":                p.UID,
		}
		// The runtime names it from the mount point on.
		if root, err := cgroup2Mount(); err == nil {
			i.Config["runtimeConfig"] = map[string]any{"cgroupPath": strings.TrimPrefix(p.CgroupPath(), root)}
		}
		i.Config["prevResult"] = p.PrevResult(c.CNIVersion)
	}
	for key, value := range c.Config {
		if value == nil {
			delete(i.Config, key)
		} else {
			i.Config[key] = value
		}
	}
	return i
}

// environ gives the plugin's whole environment: a runtime's own has nothing
// that a plugin may rely on.
func (i *Invocation) environ() []string {
	var args []string
	for k, v := range i.Args { // in any order, as containerd's
		args = append(args, k+"="+v)
	}
	env := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"GORACE=atexit_sleep_ms=0", // of [RaceEnv]: the detector would have each run rest for a second at its end
		"CNI_COMMAND=" + i.Command,
		"CNI_PATH=" + i.Path,
	}
	for _, kv := range [][2]string{
		{"CNI_CONTAINERID", i.ContainerID}, {"CNI_NETNS", i.Netns}, {"CNI_IFNAME", i.IfName}, {"CNI_ARGS", strings.Join(args, ";")},
	} {
		env = append(env, kv[0]+"="+kv[1])
	}
	return append(env, i.Env...)
}

// PrevResult gives the result that the plugins before ours would have given,
// in the form of a version of the CNI specification.
func (p *Pod) PrevResult(version string) map[string]any {
	var interfaces, ips, routes []any
	for n, i := range p.Interfaces {
		interfaces = append(interfaces, map[string]any{"name": i.Name, "mac": i.MAC, "sandbox": p.NetnsPath()})
		for _, a := range i.Addrs {
			ip := map[string]any{"address": a.String(), "interface": n}
			gw, family := gateway4, "4"
			if a.Addr().Is6() {
				gw, family = gateway6, "6"
			}
			ip["gateway"] = gw.String()
			if strings.HasPrefix(version, "0.") { // the key went with 1.0.0
				ip["version"] = family
			}
			ips = append(ips, ip)
		}
		for _, r := range i.Routes {
			gw := gateway4
			if r.Addr().Is6() {
				gw = gateway6
			}
			routes = append(routes, map[string]any{"dst": r.String(), "gw": gw.String()})
		}
	}
	return map[string]any{
		"cniVersion": version, "interfaces": interfaces, "ips": ips, "routes": routes, "dns": map[string]any{},
	}
}
