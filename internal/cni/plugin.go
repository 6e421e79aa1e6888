// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"shunt.dev/shunt/internal/answer"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/internal/spool"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

// Shunt's own error codes; below 100 they are the specification's.
const (
	CodeProgram uint = 100 // the pod could not be programmed, or the programming not removed
	CodeDiffers uint = 101 // CHECK: the programming is missing or differs
)

// checkFactsTimeout bounds how long CHECK asks for pod facts.
const checkFactsTimeout = 5 * time.Second

// A FactsSource gets the facts of a pod within its own bound of time.
type FactsSource interface {
	Pod(ctx context.Context, namespace, name, uid string) (*redirect.Pod, error)
}

// A Programmer is what makes a pod redirected.
type Programmer interface {
	// Apply programs the target as chosen, and says what came of the choice.
	Apply(ctx context.Context, t redirect.Target, p *redirect.Policy, c redirect.Choice) (redirect.Choice, error)
	// Check and Remove are those of a redirect.Backend.
	Check(ctx context.Context, t redirect.Target) error
	Remove(ctx context.Context, a redirect.Attachment) error
}

// A Node is a Programmer that knows of all pods: the node's backends.
type Node interface {
	Programmer
	// Attachments lists what is programmed for a CNI network.
	Attachments(ctx context.Context, network string) ([]redirect.Attachment, error)
	// Sweep removes what is left of pods that are gone, whatever their network.
	Sweep(ctx context.Context) ([]redirect.Attachment, error)
	// Ready fails where no pod could be programmed by a datapath, or by
	// redirect.Auto; notEBPF says why pods would go by iptables.
	Ready(ctx context.Context, datapath string) (notEBPF *redirect.Reason, err error)
}

// A plugin is the body of the CNI commands, with seams where it meets the
// world.
type plugin struct {
	stdout, stderr io.Writer

	facts      func(*netconf.Config, *slog.Logger) FactsSource
	backends   func(*netconf.Config, *slog.Logger) Programmer
	node       func(*netconf.Config, *slog.Logger) Node // for GC and STATUS
	kubeconfig func(path string) error                  // fails where pods that need the API server would
	checkNetns func(path string) error                  // refuses what must not be programmed
	podCgroup  func(cgroupRoot, hint, podUID string) (string, error)
	cgroupRoot func(configured string) (string, error)
}

// newPlugin returns the plugin with all that it may need.
func newPlugin(o Options) *plugin {
	return &plugin{
		stdout:     os.Stdout,
		stderr:     os.Stderr,
		facts:      o.Facts,
		backends:   func(conf *netconf.Config, log *slog.Logger) Programmer { return o.Backends(conf, log) },
		node:       o.Backends,
		kubeconfig: o.CheckKubeconfig,
		checkNetns: checkNetns,
		podCgroup:  podCgroup,
		cgroupRoot: loader.FindCgroup2Mount,
	}
}

func podCgroup(cgroupRoot, hint, podUID string) (string, error) {
	mount, err := loader.FindCgroup2Mount(cgroupRoot)
	if err != nil {
		return "", err
	}
	return loader.FindPodCgroup(mount, hint, podUID)
}

func (p *plugin) funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: p.add, Del: p.del, Check: p.check, GC: p.gc, Status: p.status}
}

// fail makes a CNI error, unless the request is to be handed over.
func fail(code uint, format string, args ...any) error {
	for _, a := range args {
		if err, ok := a.(error); ok && needed(err) != nil {
			return err
		}
	}
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// A call is one invocation for one attachment, read and checked.
type call struct {
	conf  *netconf.Config
	log   *slog.Logger
	spool *spool.Writer
	start time.Time
	addrs []netip.Addr // the pod's, by prevResult
	pod   podArgs
	redirect.Attachment
	netns string
}

// read reads what ADD and CHECK are given (P1).
func (p *plugin) read(command string, args *skel.CmdArgs) (*call, error) {
	start := time.Now()
	conf, err := netconf.Parse(args.StdinData)
	if err != nil {
		return nil, err
	}
	addrs, err := conf.PrevAddrs()
	if err != nil {
		return nil, err
	}
	c := &call{
		conf: conf, start: start, addrs: addrs, pod: parseArgs(args.Args), netns: args.Netns, spool: spool.Open(conf.RunDir),
		Attachment: redirect.Attachment{ContainerID: args.ContainerID, IfName: args.IfName},
	}
	c.log = newLog(p.stderr, c.spool, conf.LogLevel).With(c.attrs(command)...)
	return c, nil
}

// attrs are what each log line of the call says of it.
func (c *call) attrs(command string) []any {
	return []any{"command", command, "container", c.ContainerID, "interface", c.IfName, "pod", c.pod.String()}
}

// report tells the agent what came of an ADD, at whatever level the log is: its
// metrics live by it.
func (c *call) report(choice redirect.Choice, err error) {
	s := spool.Setup{Backend: string(choice.Datapath), Result: spool.ResultOK, Seconds: time.Since(c.start).Seconds()}
	if len(choice.Reasons) > 0 {
		name := choice.Reasons[0].Name
		s.Reason = string(name)
		s.Fallback = choice.Datapath == redirect.Iptables && name != redirect.ReasonConfigured && name != redirect.ReasonAnnotation
	}
	log := slog.New(slog.NewJSONHandler(c.spool, nil)).With(c.attrs("ADD")...)
	if err != nil {
		s.Result = spool.ResultFailed
		log.Error("pod was not set up", spool.SetupKey, s, "error", err)
		return
	}
	log.Info("pod was set up", spool.SetupKey, s)
}

// early decides by P2 to P4. Nothing that it does can fail.
func (c *call) early() bool {
	c.conf.Redirect.Agent = readAgent(c.conf.RunDir, c.conf.Redirect.Agent, c.log)
	out, decided := c.conf.Redirect.Early(c.pod.Namespace, c.pod.Name)
	if decided {
		c.log.Info("pod is left alone", "rule", out.Rule, "reason", out.Reason)
	}
	return decided
}

// decide gets the pod's facts and decides by P5 to P16. It returns no policy
// for a pod that is to be left alone.
func (p *plugin) decide(ctx context.Context, c *call) (*redirect.Pod, *redirect.Policy, error) {
	pod, err := p.facts(c.conf, c.log).Pod(ctx, c.pod.Namespace, c.pod.Name, c.pod.UID)
	if err != nil {
		return nil, nil, fail(types.ErrTryAgainLater, "%v", err)
	}
	out, policy, err := c.conf.Redirect.Evaluate(pod)
	if err != nil {
		code := types.ErrInternal
		var input *redirect.InputError
		if errors.As(err, &input) {
			code = types.ErrInvalidNetworkConfig
		}
		return nil, nil, fail(code, "read what pod %s asks for (%s): %v", c.pod, out.Rule, err)
	}
	if out.Skip {
		c.log.Info("pod is left alone", "rule", out.Rule, "reason", out.Reason)
		return pod, nil, nil
	}
	c.log.Debug("pod is to be redirected", "rule", out.Rule, "reason", out.Reason)
	return pod, policy, nil
}

// add programs the pod and prints prevResult. It does one of the two things
// that keep a pod from running beside its proxy: it programs, or it fails.
func (p *plugin) add(args *skel.CmdArgs) error {
	c, err := p.read("ADD", args)
	if err != nil {
		return err
	}
	defer c.spool.Close()
	choice, err := p.setUp(context.Background(), c)
	if needed(err) != nil {
		return err // whoever does it tells
	}
	if err != nil || choice.Datapath != "" {
		c.report(choice, err)
	}
	return err
}

// setUp is add's work. It returns no choice for a pod that is left alone.
func (p *plugin) setUp(ctx context.Context, c *call) (choice redirect.Choice, err error) {
	result, err := c.conf.Result()
	if err != nil {
		return choice, err
	}
	if c.early() {
		return choice, p.print(result)
	}
	pod, policy, err := p.decide(ctx, c)
	if err != nil {
		return choice, err
	}
	if policy == nil {
		return choice, p.print(result)
	}
	choice, err = redirect.Choose(c.conf.Datapath, c.conf.InboundHook, pod, policy)
	if err != nil {
		code := CodeProgram
		var input *redirect.InputError
		if errors.As(err, &input) {
			code = types.ErrInvalidNetworkConfig
		}
		return choice, fail(code, "choose a datapath for pod %s: %v", c.pod, err)
	}
	if err := p.checkNetns(c.netns); err != nil {
		return choice, fail(types.ErrInvalidNetNS, "program pod %s: %v", c.pod, err)
	}
	return p.program(ctx, c, p.target(c, pod), policy, choice, result)
}

// program applies the policy and prints the result. It does both or neither.
func (p *plugin) program(ctx context.Context, c *call, t redirect.Target, policy *redirect.Policy, choice redirect.Choice, result []byte) (_ redirect.Choice, err error) {
	node := p.backends(c.conf, c.log)
	defer func() {
		if err == nil || needed(err) != nil {
			return
		}
		// Apply has undone its own; this is for a result that could not be
		// printed, and for what a backend may have missed.
		if undo := node.Remove(ctx, c.Attachment); undo != nil {
			err = fail(CodeProgram, "%v; undo it: %v", err, undo)
		}
	}()
	start := time.Now()
	if choice, err = node.Apply(ctx, t, policy, choice); err != nil {
		return choice, fail(CodeProgram, "program pod %s: %v", c.pod, err)
	}
	c.log.Info("pod is redirected", "datapath", choice.Datapath, "reason", choice.Reasons[0].Name, "why", choice.Reasons.String(),
		"cgroup", t.Cgroup, "took", time.Since(start))
	return choice, p.print(result)
}

// target says what is to be programmed.
func (p *plugin) target(c *call, pod *redirect.Pod) redirect.Target {
	t := redirect.Target{
		Attachment: c.Attachment,
		Network:    c.conf.Name,
		Netns:      c.netns,
		Pod:        redirect.PodRef{Namespace: c.pod.Namespace, Name: c.pod.Name, UID: c.pod.UID},
		Addrs:      c.addrs,
	}
	uid := c.pod.UID
	if uid == "" && pod != nil { // by a runtime from before K8S_POD_UID
		t.Pod.UID, uid = pod.UID, pod.NodeUID()
	}
	t.Cgroup, t.NoCgroup = p.podCgroup(c.conf.CgroupRoot, c.conf.CgroupPath, uid)
	return t
}

// del removes what add made. It prints nothing.
func (p *plugin) del(args *skel.CmdArgs) error {
	conf, err := netconf.ParseForRemoval(args.StdinData)
	if err != nil {
		return err
	}
	lines := spool.Open(conf.RunDir)
	defer lines.Close()
	log := newLog(p.stderr, lines, conf.LogLevel).With("command", "DEL", "container", args.ContainerID, "interface", args.IfName)
	a := redirect.Attachment{ContainerID: args.ContainerID, IfName: args.IfName}
	if err := p.backends(conf, log).Remove(context.Background(), a); err != nil {
		return fail(CodeProgram, "remove what was programmed for container %s: %v", a.ContainerID, err)
	}
	log.Debug("nothing is programmed for the attachment any more")
	return nil
}

// check compares what is programmed with what add made. The pod's facts are
// asked for only where nothing is programmed: to tell a pod that was rightly
// left alone from one that lost its programming.
func (p *plugin) check(args *skel.CmdArgs) error {
	ctx := context.Background()
	c, err := p.read("CHECK", args)
	if err != nil {
		return err
	}
	defer c.spool.Close()
	if c.early() {
		return nil
	}
	err = p.backends(c.conf, c.log).Check(ctx, p.target(c, nil))
	if err == nil || needed(err) != nil {
		return err
	}
	if !errors.Is(err, redirect.ErrNotProgrammed) {
		return fail(CodeDiffers, "check pod %s: %v", c.pod, err)
	}
	c.conf.PodFactsTimeout = min(c.conf.PodFactsTimeout, checkFactsTimeout)
	_, policy, factsErr := p.decide(ctx, c)
	if factsErr != nil {
		return factsErr
	}
	if policy != nil {
		return fail(CodeDiffers, "check pod %s: it is to be redirected, but %v", c.pod, err)
	}
	return nil
}

// gc removes what belongs to no attachment that the runtime knows.
func (p *plugin) gc(args *skel.CmdArgs) error {
	ctx := context.Background()
	conf, err := netconf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	valid, err := conf.ValidAttachments()
	if err != nil {
		return err
	}
	lines := spool.Open(conf.RunDir)
	defer lines.Close()
	log := newLog(p.stderr, lines, conf.LogLevel).With("command", "GC")
	node := p.node(conf, log)
	present, err := node.Attachments(ctx, conf.Name)
	if err != nil {
		return fail(CodeProgram, "collect garbage: list what is programmed: %v", err)
	}
	var errs []error
	for _, a := range present {
		if slices.Contains(valid, a) {
			continue
		}
		if err := node.Remove(ctx, a); err != nil {
			errs = append(errs, fmt.Errorf("remove what was programmed for container %s: %w", a.ContainerID, err))
			continue
		}
		log.Info("removed what belonged to no valid attachment", "container", a.ContainerID, "interface", a.IfName)
	}
	swept, err := node.Sweep(ctx)
	for _, a := range swept {
		log.Info("removed what was left of a pod that is gone", "container", a.ContainerID, "interface", a.IfName)
	}
	if err != nil {
		errs = append(errs, fmt.Errorf("remove what is left of pods that are gone: %w", err))
	}
	if err := errors.Join(errs...); err != nil {
		return fail(CodeProgram, "collect garbage: %v", err)
	}
	return nil
}

// status fails where no pod of a mesh could be set up. It does not where only
// the kubeconfig is missing: the node agent writes that, and the runtime would
// take the failure for a node without a network, on which the kubelet starts
// no pod that needs one, so that the agent could never come.
func (p *plugin) status(args *skel.CmdArgs) error {
	conf, err := netconf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	lines := spool.Open(conf.RunDir)
	defer lines.Close()
	log := newLog(p.stderr, lines, conf.LogLevel).With("command", "STATUS")
	by, err := p.able(conf, log)
	said := answer.Status{Able: err == nil, Datapath: conf.Datapath, Text: by}
	if err != nil {
		said.Text = err.Error()
	}
	if err := answer.Write(conf.RunDir, said); err != nil {
		log.Warn("the node agent does not learn of this STATUS", "error", err)
	}
	if err != nil {
		return fail(types.ErrPluginNotAvailable, "%v", err)
	}
	if err := p.kubeconfig(conf.Kubeconfig); err != nil {
		log.Warn("pods of the mesh can't be set up while the node agent does not answer: only pods that need no facts can", "error", err)
	}
	return nil
}

// able fails unless pods can be set up, and says by what they are.
func (p *plugin) able(conf *netconf.Config, log *slog.Logger) (by string, err error) {
	datapath := conf.Datapath
	var notEBPF *redirect.Reason
	if _, err := p.cgroupRoot(conf.CgroupRoot); err != nil && datapath != string(redirect.Iptables) {
		if datapath == string(redirect.EBPF) {
			return "", err
		}
		notEBPF = &redirect.Reason{Name: redirect.ReasonNoCgroup2, Text: err.Error()}
		datapath = string(redirect.Iptables)
	}
	why, err := p.node(conf, log).Ready(context.Background(), datapath)
	if err != nil {
		if notEBPF != nil {
			err = fmt.Errorf("datapath ebpf: %s; datapath iptables: %w", notEBPF.Text, err)
		}
		return "", err
	}
	if notEBPF = cmp.Or(notEBPF, why); notEBPF != nil {
		log.Warn("pods are redirected by iptables", "reason", notEBPF.Name, "error", notEBPF.Text)
		return fmt.Sprintf("pods get iptables (%s): %s", notEBPF.Name, notEBPF.Text), nil
	}
	if datapath == string(redirect.Iptables) {
		return "pods get iptables", nil
	}
	return "pods get ebpf, unless they need iptables", nil
}

// print writes ADD's result. Nothing else is ever written to standard output,
// which is CNI's.
func (p *plugin) print(result []byte) error {
	if _, err := p.stdout.Write(result); err != nil {
		return fail(types.ErrIOFailure, "print the result: %v", err)
	}
	return nil
}
