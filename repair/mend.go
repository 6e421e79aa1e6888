// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/iptables"
)

// network is the name that attachments made here are recorded under, where the
// configuration has none (it is an entry of a conflist). No CNI network can have
// it, so no runtime's GC takes them for its own; DEL ends them by their ID.
const network = "shunt repair"

// How long one pod may take, of which most is waiting for the node's lock.
const (
	lookTime = 30 * time.Second
	mendTime = time.Minute
)

// A programmer is the node's backends.
type programmer interface {
	Apply(ctx context.Context, t redirect.Target, p *redirect.Policy, c redirect.Choice) (redirect.Choice, error)
	Check(ctx context.Context, t redirect.Target) error
	Remove(ctx context.Context, a redirect.Attachment) error
	Attachments(ctx context.Context, network string) ([]redirect.Attachment, error)
	// Foreign names what of others redirects in a network namespace.
	Foreign(ctx context.Context, netns string) ([]string, error)
}

// sandboxes is what a finder is.
type sandboxes interface {
	find(ctx context.Context, pod *corev1.Pod) (*sandbox, error)
	all(ctx context.Context) (map[string]bool, error)
}

// A mender programs pods that run, as the plugin does those that start. What it
// does, it does one after the other.
type mender struct {
	conf *netconf.Config
	log  *slog.Logger
	find sandboxes
	node programmer

	mu   sync.Mutex
	gone map[redirect.Attachment]bool // that tidy has missed once
}

// A state is how a pod that is to be redirected is.
type state int

const (
	stateUnknown state = iota // an error says why
	stateGood
	stateLost    // nothing is programmed
	stateWrong   // what is programmed differs
	stateForeign // nothing of ours, but others redirect
)

// A patient is a pod that is to be redirected, with where it runs.
type patient struct {
	pod    *corev1.Pod
	facts  *redirect.Pod
	policy *redirect.Policy
	target redirect.Target
	box    *sandbox
}

// A skipError says that a pod is to be left alone.
type skipError struct{ redirect.Outcome }

func (e *skipError) Error() string {
	return fmt.Sprintf("the pod is to be left alone (%s: %s)", e.Rule, e.Reason)
}

// decide applies the rules to a pod. It fails with a *skipError for one that is
// to be left alone, and with a *redirect.InputError where its annotations can't
// be read.
func (m *mender) decide(pod *corev1.Pod) (*redirect.Pod, *redirect.Policy, error) {
	conf := m.conf.Redirect
	conf.Agent = readAgent(m.conf.RunDir)
	if out, decided := conf.Early(pod.Namespace, pod.Name); decided {
		return nil, nil, &skipError{out}
	}
	facts, err := factsOf(pod)
	if err != nil {
		return nil, nil, err
	}
	out, policy, err := conf.Evaluate(facts)
	if err != nil {
		return nil, nil, fmt.Errorf("read what the pod asks for (%s): %w", out.Rule, err)
	}
	if out.Skip {
		return nil, nil, &skipError{out}
	}
	return facts, policy, nil
}

// readAgent reads which DaemonSet the node agent is (P4), as the plugin does.
func readAgent(runDir string) redirect.AgentRef {
	data, err := os.ReadFile(filepath.Join(runDir, "agent"))
	namespace, daemonSet, ok := strings.Cut(strings.TrimSpace(string(data)), "/")
	if err != nil || !ok {
		return redirect.AgentRef{}
	}
	return redirect.AgentRef{Namespace: namespace, DaemonSet: daemonSet}
}

// admit finds where a pod runs.
func (m *mender) admit(ctx context.Context, pod *corev1.Pod) (*patient, error) {
	facts, policy, err := m.decide(pod)
	if err != nil {
		return nil, err
	}
	box, err := m.find.find(ctx, pod)
	if err != nil {
		return nil, fmt.Errorf("find the pod's network namespace: %w", err)
	}
	p := &patient{pod: pod, facts: facts, policy: policy, box: box}
	p.target = redirect.Target{
		Attachment: redirect.Attachment{ContainerID: box.ID, IfName: interfaceOf(pod)},
		Network:    m.conf.Name, Netns: box.Netns, Running: true,
		Pod: redirect.PodRef{Namespace: pod.Namespace, Name: pod.Name, UID: nodeUID(pod)},
	}
	if p.target.Network == "" {
		p.target.Network = network
	}
	for _, ip := range pod.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			p.target.Addrs = append(p.target.Addrs, a)
		}
	}
	mount, err := loader.FindCgroup2Mount(m.conf.CgroupRoot)
	if err != nil {
		p.target.NoCgroup = err
	} else {
		p.target.Cgroup, p.target.NoCgroup = loader.FindPodCgroup(mount, "", nodeUID(pod))
	}
	return p, nil
}

// keyNetworks is where pods ask for further networks (Multus).
const keyNetworks = "k8s.v1.cni.cncf.io/networks"

// ownNetwork is Shunt's own NetworkAttachmentDefinition, for meta-plugins.
const ownNetwork = "shunt-cni"

// interfaceOf is the CNI_IFNAME under which a runtime calls the plugin for a
// pod: eth0 in a chain; where a meta-plugin calls it, what the annotation says,
// or netN for its Nth network.
func interfaceOf(pod *corev1.Pod) string {
	text := strings.TrimSpace(pod.Annotations[keyNetworks])
	type network struct {
		Name      string `json:"name"`
		Interface string `json:"interface"`
	}
	var list []network
	if strings.HasPrefix(text, "[") {
		if json.Unmarshal([]byte(text), &list) != nil {
			return "eth0"
		}
	} else if text != "" {
		for item := range strings.SplitSeq(text, ",") {
			name := strings.TrimSpace(item)
			if _, rest, ok := strings.Cut(name, "/"); ok {
				name = rest
			}
			name, ifname, _ := strings.Cut(name, "@")
			list = append(list, network{name, ifname})
		}
	}
	for i, n := range list {
		switch {
		case n.Name != ownNetwork:
		case n.Interface != "":
			return n.Interface
		default:
			return fmt.Sprintf("net%d", i+1)
		}
	}
	return "eth0"
}

// look says how a pod is. The error says what is wrong, or why that can't be
// told.
func (m *mender) look(ctx context.Context, pod *corev1.Pod) (*patient, state, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	return m.lookLocked(ctx, pod, false)
}

// lookLocked does not look for others' doing where that is of no concern.
func (m *mender) lookLocked(ctx context.Context, pod *corev1.Pod, others bool) (*patient, state, error) {
	p, err := m.admit(ctx, pod)
	if err != nil {
		return nil, stateUnknown, err
	}
	err = m.node.Check(ctx, p.target)
	switch {
	case err == nil:
		return p, stateGood, nil
	case couldNotTell(err), !exists(p.target.Netns):
		return p, stateUnknown, err
	case !errors.Is(err, redirect.ErrNotProgrammed):
		return p, stateWrong, err
	}
	if others {
		return p, stateLost, err
	}
	chains, err2 := m.node.Foreign(ctx, p.target.Netns)
	switch {
	case err2 != nil:
		return p, stateUnknown, err2
	case len(chains) > 0:
		return p, stateForeign, fmt.Errorf("iptables chains %s", strings.Join(chains, ", "))
	}
	return p, stateLost, err
}

// couldNotTell reports whether an error says nothing of the pod.
func couldNotTell(err error) bool {
	for _, is := range []error{fs.ErrPermission, context.Canceled, context.DeadlineExceeded, iptables.ErrNotInstalled} {
		if errors.Is(err, is) {
			return true
		}
	}
	return false
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// mend makes sure that a pod is redirected: already says that it was. others
// says whether it is to be programmed in spite of what others redirect there.
func (m *mender) mend(ctx context.Context, pod *corev1.Pod, others bool) (by redirect.Choice, already bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, mendTime)
	defer cancel()
	p, how, err := m.lookLocked(ctx, pod, others)
	switch how {
	case stateGood:
		return by, true, nil
	case stateUnknown, stateForeign:
		return by, false, err
	}
	choice, err := redirect.Choose(m.conf.Datapath, m.conf.InboundHook, p.facts, p.policy)
	if err != nil {
		return by, false, fmt.Errorf("choose a datapath: %w", err)
	}
	if by, err = m.node.Apply(ctx, p.target, p.policy, choice); err != nil {
		return by, false, err
	}
	// A sandbox that has ended meanwhile has had its DEL, or it comes yet: what
	// was programmed after the one would stay.
	again, err := m.find.find(ctx, pod)
	if err == nil && again.ID == p.box.ID {
		return by, false, nil
	}
	if err != nil && !errors.Is(err, errNoSandbox) {
		return by, false, nil // it can't be told: what is programmed is right for what was there
	}
	err = m.node.Remove(ctx, p.target.Attachment)
	return by, false, errors.Join(fmt.Errorf("it was undone, because its sandbox has ended meanwhile: %w", errNoSandbox), err)
}

// tidy removes what was programmed here for sandboxes that the runtime no longer
// has: their DEL was lost. It takes no chances, for a pod that lives would go
// around its proxy: a runtime that knows of no sandbox at all is not believed (it
// has at least the controller's own), and any other only the second time.
func (m *mender) tidy(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	ours, err := m.node.Attachments(ctx, network)
	if err != nil || len(ours) == 0 {
		return err
	}
	there, err := m.find.all(ctx)
	if err != nil || len(there) == 0 {
		return err
	}
	var errs []error
	before := m.gone
	m.gone = map[redirect.Attachment]bool{}
	for _, a := range ours {
		if there[a.ContainerID] {
			continue
		}
		if !before[a] {
			m.gone[a] = true
			continue
		}
		if err := m.node.Remove(ctx, a); err != nil {
			errs = append(errs, fmt.Errorf("remove what was programmed for sandbox %s: %w", a.ContainerID, err))
			continue
		}
		m.log.Info("removed what was programmed for a sandbox that is gone", "container", a.ContainerID)
	}
	return errors.Join(errs...)
}
