// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

// A Record is what is known of one attachment.
type Record struct{ record }

// Of reports whether the record is of a network namespace, known by its inode and
// its cookie.
func (r *Record) Of(inode, cookie uint64) bool {
	return r.in(inode, cookie, loader.BootID())
}

// Records lists the attachments of a node that have a record; those that can't be
// read are in the error.
func Records(runDir string) ([]*Record, error) {
	records, err := New(Options{RunDir: runDir}).records()
	out := make([]*Record, len(records))
	for i, r := range records {
		out[i] = &Record{*r}
	}
	return out, err
}

// A Status is one attachment, as its network namespace has it.
type Status struct {
	*Record
	// Gone: the network namespace is no more, or can't be found.
	Gone bool
	// Changing: something looked wrong while another process was at work on it.
	Changing bool
	// Chains are those that the record speaks of.
	Chains []Chain
	// Wrong says what is not as it should be, a clause each.
	Wrong []string
	// Counted: Flows were asked for. They are the connections decided since the
	// rules were made, or were last changed, by rule, of both families.
	//
	// The packets that nat's rules have seen are the first of each connection;
	// one whose first packet is dropped counts again with each repetition.
	// [out-default] and [in-default] have no rules: what goes into a chain, and
	// is not counted by any of its rules, is theirs. In TPROXY mode [in-include]
	// is what nat sees that TPROXY has handed over. [out-proxy-gid-local] is
	// never reached.
	Counted bool
	Flows   map[redirect.Rule]uint64
}

// A Chain is one of ours in the pod.
type Chain struct {
	Family      Family
	Table, Name string
	// State is loader.HookUnknown where only a program could tell, and none was
	// started.
	State loader.HookState
}

func (c Chain) String() string { return fmt.Sprintf("%v %s %s", c.Family, c.Table, c.Name) }

// Status looks at every attachment that has a record; what could be told is told
// with an error too. It changes nothing. Pods that another backend redirects by now
// are left out.
//
// The kernel says whether the chains are there, without any program's help; of
// iptables-legacy it says only whether there is any table. Of the pods that closely
// names, nil: of none, the rules are compared and the connections counted: that
// costs one child process for each family of each pod.
func (b *Backend) Status(ctx context.Context, closely func(redirect.PodRef) bool) (out []Status, err error) {
	records, err := b.records()
	errs := []error{err}
	for _, r := range records {
		if r.Kept {
			continue // another backend redirects the pod
		}
		st, err := b.lookSettled(ctx, r, closely != nil && closely(r.Pod))
		if err != nil {
			errs = append(errs, fmt.Errorf("attachment %s@%s: %w", r.ContainerID, r.IfName, err))
		}
		if st != nil {
			out = append(out, *st)
		}
		if ctx.Err() != nil {
			break
		}
	}
	slices.SortFunc(out, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.ContainerID, b.ContainerID), cmp.Compare(a.IfName, b.IfName))
	})
	return out, errors.Join(errs...)
}

// lookSettled looks again where what looks wrong may be another process's work,
// half done. It returns nil where the attachment has gone.
func (b *Backend) lookSettled(ctx context.Context, r *record, closely bool) (st *Status, err error) {
	for range 3 {
		st, err = b.look(ctx, r, closely)
		if ctx.Err() != nil || err == nil && !st.Gone && len(st.Wrong) == 0 {
			return st, err
		}
		busy, err2 := b.busy(r.Attachment)
		if err2 != nil {
			return st, errors.Join(err, err2)
		}
		now, err2 := readRecord(b.recordPath(r.Attachment))
		switch {
		case err2 != nil:
			return st, errors.Join(err, err2)
		case now == nil:
			return nil, nil
		case busy:
			st.Changing = true
			return st, nil
		case now.Done == r.Done && now.Inode == r.Inode && now.IPv4 == r.IPv4 && now.IPv6 == r.IPv6 && now.Mode == r.Mode:
			return st, err
		}
		r = now
	}
	st.Changing = true
	return st, nil
}

// busy says whether another process is at work on an attachment. It takes no
// lock.
func (b *Backend) busy(a redirect.Attachment) (bool, error) {
	path := filepath.Join(b.dir(), "lock")
	f, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open the lock: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	defer unix.Close(f)
	l := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: lockPlace(a), Len: 1}
	if err := unix.FcntlFlock(uintptr(f), unix.F_OFD_GETLK, &l); err != nil {
		return false, fmt.Errorf("ask who has the lock: %w", err)
	}
	return l.Type != unix.F_UNLCK, nil
}

func (b *Backend) look(ctx context.Context, r *record, closely bool) (*Status, error) {
	st := &Status{Record: &Record{*r}}
	n, err := r.open()
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errNotNamespace), errors.Is(err, loader.ErrHostNetns):
		st.Gone = true
		return st, nil
	case err != nil:
		return st, err
	}
	defer n.close()
	if st.Gone = !r.of(n); st.Gone {
		return st, nil
	}
	if !r.Done {
		st.Wrong = append(st.Wrong, "it was not programmed to the end")
	}
	if n.ipv6 && r.IPv6 == "" {
		st.Wrong = append(st.Wrong, "IPv6 was switched on after the pod was programmed, and goes directly")
	}
	if err := st.lookChains(n); err != nil {
		return st, err
	}
	if !closely {
		return st, nil
	}
	missing, err := n.checkPrepared(r)
	if err != nil {
		return st, err
	}
	st.Wrong = append(st.Wrong, missing...)
	return st, b.count(ctx, n, st)
}

// lookChains asks the kernel for the chains.
func (st *Status) lookChains(n *namespace) error {
	type chain struct {
		family      Family
		table, name string
	}
	there := map[chain]bool{}
	state := func(c chain) loader.HookState {
		if there[c] {
			return loader.HookAttached
		}
		return loader.HookMissing
	}
	if st.Mode == NFT {
		err := n.do(func() error {
			return eachNFTChain(func(head unix.Nfgenmsg, table, name string) {
				family := IPv4
				if head.Nfgen_family == unix.NFPROTO_IPV6 {
					family = IPv6
				}
				there[chain{family, table, name}] = true
			})
		})
		if err != nil {
			return err
		}
	} else {
		traces, err := n.traces()
		if err != nil {
			return err
		}
		if traces.legacy {
			state = func(chain) loader.HookState { return loader.HookUnknown }
		}
	}
	for _, f := range st.families() {
		for _, t := range parse(st.rules(f)).tables {
			for _, c := range t.chains {
				x := Chain{Family: f, Table: t.name, Name: c.name, State: state(chain{f, t.name, c.name})}
				st.Chains = append(st.Chains, x)
				if x.State == loader.HookMissing {
					st.Wrong = append(st.Wrong, fmt.Sprintf("the chain %v is missing", x))
				}
			}
		}
	}
	return nil
}

// count has the programs list the rules with their counters, and compares.
func (b *Backend) count(ctx context.Context, n *namespace, st *Status) error {
	programs, err := b.named(ctx, st.Mode)
	if err != nil {
		return err
	}
	families := st.families()
	texts := make([]string, len(families))
	err = each(families, func(f Family) error {
		text, err := b.run(ctx, n, "", programs.save(f), "-c")
		if err != nil {
			return fmt.Errorf("read the pod's %v rules: %w", f, err)
		}
		texts[slices.Index(families, f)] = text
		return nil
	})
	if err != nil {
		return err
	}
	st.Counted, st.Flows = true, map[redirect.Rule]uint64{}
	// What was only looked for is seen now.
	st.Wrong = slices.DeleteFunc(st.Wrong, func(s string) bool { return strings.HasPrefix(s, "the chain ") })
	for i, f := range families {
		rules, packets := uncount(texts[i])
		got := parse(rules)
		for j := range st.Chains {
			if c := &st.Chains[j]; c.Family == f {
				c.State = loader.HookMissing
				if t := got.table(c.Table); t != nil && t.find(c.Name) != nil {
					c.State = loader.HookAttached
				}
			}
		}
		if diff := differences(parse(st.rules(f)), got); diff != "" {
			st.Wrong = append(st.Wrong, fmt.Sprintf("%v: %s", f, diff))
		}
		for rule, count := range flows(st.rules(f), packets) {
			st.Flows[rule] += count
		}
	}
	return nil
}

// A counted is the counter of a rule of a table.
type counted struct {
	table, chain string
	spec         string // normal
	packets      uint64
}

// uncount takes the counters out of what iptables-save -c gives.
func uncount(text string) (rules string, packets []counted) {
	var b strings.Builder
	table := ""
	for line := range strings.Lines(text) {
		if name, ok := strings.CutPrefix(line, "*"); ok {
			table = strings.TrimSpace(name)
		}
		counters, rule, ok := strings.Cut(line, "] ")
		if !ok || line[0] != '[' {
			b.WriteString(line)
			continue
		}
		b.WriteString(rule)
		chain, spec, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(rule), "-A "), " ")
		n, _, _ := strings.Cut(counters[1:], ":")
		if count, err := strconv.ParseUint(n, 10, 64); err == nil {
			packets = append(packets, counted{table, chain, normal(spec), count})
		}
	}
	return b.String(), packets
}

// flows gives the connections by rule. want is what was applied, in which the
// rules' names stand above them.
func flows(want string, packets []counted) map[redirect.Rule]uint64 {
	type place struct{ chain, spec string }
	rules := map[place]redirect.Rule{}
	var rule redirect.Rule
	table := ""
	for line := range strings.Lines(want) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "*"); ok {
			table, rule = name, 0
		} else if why, ok := strings.CutPrefix(line, "# "); ok {
			rule = ruleFor(why)
		} else if spec, ok := strings.CutPrefix(line, "-A "); ok && table == "nat" {
			chain, spec, _ := strings.Cut(spec, " ")
			// A rule that is the same as one before it is never reached.
			if p := (place{chain, normal(spec)}); ours(chain) && rules[p] == 0 {
				rules[p] = rule
			}
		}
	}
	out := map[redirect.Rule]uint64{}
	into, decided := map[string]uint64{}, map[string]uint64{}
	for _, c := range packets {
		switch {
		case c.table != "nat":
		case ours(c.chain):
			decided[c.chain] += c.packets
			if r := rules[place{c.chain, c.spec}]; r != 0 && c.packets > 0 {
				out[r] += c.packets
			}
		case ours(target(c.spec)):
			into[target(c.spec)] += c.packets
		}
	}
	for chain, rule := range map[string]redirect.Rule{chainOut: redirect.RuleOutDefault, chainIn: redirect.RuleInDefault} {
		if into[chain] > decided[chain] {
			out[rule] += into[chain] - decided[chain]
		}
	}
	return out
}

// ruleFor gives the row of the semantics that the comment above a rule names; 0
// for none.
func ruleFor(why string) redirect.Rule {
	switch why {
	case whyTProxyHasIt:
		return redirect.RuleInInclude
	case whyMarked:
		return redirect.RuleOutPassthrough
	}
	for _, r := range redirect.AllRules() {
		if bracketed(r) == why {
			return r
		}
	}
	return 0
}
