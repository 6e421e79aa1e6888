// SPDX-License-Identifier: Apache-2.0

package backends

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/iptables"
)

// A Status is one attachment, and what is wrong with it.
type Status struct {
	redirect.Attachment
	Network string
	Pod     redirect.PodRef // empty: the record names none
	// Datapath is EBPF where both are recorded, which is a problem.
	Datapath redirect.Datapath
	Hook     redirect.Hook // of EBPF
	Netns    string        // path
	Hooks    []HookStatus
	// Listeners are those at the proxy's inbound port; of EBPF only.
	Listeners []ListenerStatus
	// Flows are the connections decided so far, by rule, in the order of the
	// semantics; rules that none was decided by are left out. Counted: they were
	// asked for. See iptables.Status for what iptables counts.
	//
	// Flows and Errors are the network namespace's: of several attachments that
	// it has, the first has them.
	Flows    []Flow
	Counted  bool
	Errors   []ErrorCount
	Problems []Problem
}

// A HookStatus is a program of eBPF's, or a chain of iptables', of the pod.
type HookStatus struct {
	Name  string
	State loader.HookState
	Text  string // what is wrong, a clause
}

// A ListenerStatus is what listens at one address at the proxy's inbound port.
type ListenerStatus struct {
	Address    string // address:port
	OnlyIPv6   bool
	MPTCP      bool
	Sockets    int
	Registered int      // of them, to get connections by sk_lookup
	Serves     []string // "ipv4", "ipv6": the families whose connections it gets by sk_lookup
}

// A Flow is how many connections one rule has decided.
type Flow struct {
	Direction string // "outbound", "inbound"
	Rule      string // its name in the semantics, without brackets
	Count     uint64
}

// An ErrorCount is how often something has failed in the kernel.
type ErrorCount struct {
	Program string // connect, sockops, getsockopt, sendmsg, tc, inbound (either hook), any
	Error   string // the place and the error's name: "listener-register EOPNOTSUPP"
	Count   uint64
	Text    string // what failed, and what came of it
}

// Status says how every attachment of the node is, sorted. What could be told is
// told with an error too; a node that has nothing has an empty status. It changes
// nothing, and starts no process: it may be asked every few seconds. It leaves
// out what that costs too much for; see Inspect.
func (b *Backends) Status(ctx context.Context) ([]Status, error) {
	return b.status(ctx, nil)
}

// Inspect is Status for people who look: of the pods that which names, the
// connections that iptables has decided are counted, and rules and map entries
// compared with what they were made; what is attached to cgroups and network
// namespaces beside the pod's own, and processes outside of the pods' cgroups, are
// looked for.
func (b *Backends) Inspect(ctx context.Context, which func(redirect.PodRef) bool) ([]Status, error) {
	list, err := b.status(ctx, which)
	return slices.DeleteFunc(list, func(s Status) bool { return !which(s.Pod) }), err
}

// Errors is what the node's programs have counted, also for pods that are gone.
// The kernel forgets what was counted least recently.
func (b *Backends) Errors(context.Context) ([]ErrorCount, error) {
	list, err := loader.Errors(b.node)
	return errorCounts(list), err
}

func (b *Backends) status(ctx context.Context, which func(redirect.PodRef) bool) ([]Status, error) {
	return settled(ctx, func() ([]Status, error) { return b.look(ctx, which) })
}

// How long a change from one backend to the other, which looks as if it had not
// come to its end, is waited for, and how often it is looked at meanwhile.
const (
	changeTime  = time.Second
	changeLooks = 10
)

// settled looks again where both backends have a record: each works under a lock
// of its own, and between the two steps of a change none is held.
func settled(ctx context.Context, look func() ([]Status, error)) (list []Status, err error) {
	tick := time.NewTicker(changeTime / changeLooks)
	defer tick.Stop()
	for range changeLooks {
		list, err = look()
		if !slices.ContainsFunc(list, changing) {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return list, err
		}
	}
	return list, err
}

func changing(s Status) bool {
	return slices.ContainsFunc(s.Problems, func(p Problem) bool { return p.Name == ProblemBoth })
}

func (b *Backends) look(ctx context.Context, which func(redirect.PodRef) bool) ([]Status, error) {
	survey, err := loader.Look(ctx, b.node, which != nil)
	rules, err2 := b.rules.Status(ctx, which)
	return join(survey, rules), errors.Join(err, err2)
}

// join makes one list of both backends' findings.
func join(survey *loader.Survey, rules []iptables.Status) []Status {
	found := map[redirect.Attachment]*Status{}
	counted := map[any]bool{}
	for i := range survey.Attachments {
		l := &survey.Attachments[i]
		s := &Status{
			Attachment: redirect.Attachment(l.ID), Network: l.Network, Pod: redirect.PodRef(l.Pod),
			Datapath: redirect.EBPF, Hook: cmp.Or(redirect.Hook(l.InboundHook), redirect.HookSkLookup), Netns: l.Netns,
			Problems: problemsOfEBPF(l, survey),
		}
		for _, h := range l.Hooks {
			s.Hooks = append(s.Hooks, HookStatus(h))
		}
		for _, x := range l.Listeners {
			s.Listeners = append(s.Listeners, listener(x))
		}
		if s.Counted = l.Loaded; !counted[l.Cookie] && l.Loaded {
			counted[l.Cookie] = true
			for _, r := range redirect.AllRules() {
				s.count(r, l.Flows[r])
			}
			s.Errors = errorCounts(l.Errors)
		}
		found[s.Attachment] = s
	}
	for i := range rules {
		r := &rules[i]
		s := found[r.Attachment]
		if s == nil {
			s = &Status{Attachment: r.Attachment, Network: r.Network, Pod: r.Pod, Datapath: redirect.Iptables, Netns: r.Netns, Counted: r.Counted}
			found[r.Attachment] = s
		} else if !r.Gone && !r.Changing {
			s.Problems = append(s.Problems, problemBoth(s))
		}
		for _, c := range r.Chains {
			h := HookStatus{Name: c.String(), State: c.State}
			switch c.State {
			case loader.HookMissing:
				h.Text = "the chain is missing"
			case loader.HookUnknown:
				h.Text = "a program would have to be asked"
			}
			s.Hooks = append(s.Hooks, h)
		}
		namespace := [2]uint64{r.Inode, r.Cookie}
		if !counted[namespace] {
			counted[namespace] = true
			for _, rule := range redirect.AllRules() {
				s.count(rule, r.Flows[rule])
			}
		}
		s.Problems = append(s.Problems, problemsOfIptables(r)...)
	}
	list := make([]Status, 0, len(found))
	for _, s := range found {
		list = append(list, *s)
	}
	slices.SortFunc(list, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Pod.Namespace, b.Pod.Namespace), cmp.Compare(a.Pod.Name, b.Pod.Name),
			cmp.Compare(a.ContainerID, b.ContainerID), cmp.Compare(a.IfName, b.IfName))
	})
	return list
}

// count adds connections that a rule has decided.
func (s *Status) count(r redirect.Rule, n uint64) {
	if n == 0 {
		return
	}
	if i := slices.IndexFunc(s.Flows, func(f Flow) bool { return f.Rule == r.String() }); i >= 0 {
		s.Flows[i].Count += n
		return
	}
	s.Flows = append(s.Flows, Flow{Direction: r.Direction().String(), Rule: r.String(), Count: n})
}

func listener(l loader.Listener) ListenerStatus {
	s := ListenerStatus{Address: l.Addr.String(), OnlyIPv6: l.OnlyIPv6, MPTCP: l.MPTCP, Sockets: l.Registered + l.Others, Registered: l.Registered}
	if l.Serves4 {
		s.Serves = append(s.Serves, "ipv4")
	}
	if l.Serves6 {
		s.Serves = append(s.Serves, "ipv6")
	}
	return s
}

// errorCounts joins the counts of the same name.
func errorCounts(list []loader.ErrorCount) (out []ErrorCount) {
	for _, e := range list {
		i := slices.IndexFunc(out, func(x ErrorCount) bool { return x.Program == e.Program() && x.Error == e.Name() })
		if i < 0 {
			i = len(out)
			out = append(out, ErrorCount{Program: e.Program(), Error: e.Name(), Text: e.Text()})
		}
		out[i].Count += e.Count
	}
	slices.SortFunc(out, func(a, b ErrorCount) int {
		return cmp.Or(cmp.Compare(a.Program, b.Program), cmp.Compare(a.Error, b.Error))
	})
	return out
}
