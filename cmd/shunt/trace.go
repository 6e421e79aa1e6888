// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/trace"
	"shunt.dev/shunt/redirect"
)

// lookEvery is how often trace looks whether pods have come, or decisions were
// lost.
const lookEvery = 50 * time.Millisecond

// settleTime is more than the resolution of a folder's time: while one is younger,
// it may change and show the same.
const settleTime = 100 * time.Millisecond

// What trace writes, a line each; of these the JSON is documented in docs/CLI.md.
type (
	traced struct {
		Type        string         `json:"type"` // "decision"
		Time        time.Time      `json:"time"`
		Pod         *podName       `json:"pod,omitempty"` // none: it is known to no record
		Direction   string         `json:"direction"`
		Proto       string         `json:"proto"`
		Process     *traceProcess  `json:"process,omitempty"` // outbound
		Source      netip.AddrPort `json:"source,omitzero"`   // inbound
		Interface   int            `json:"interface,omitempty"`
		Destination netip.AddrPort `json:"destination"`
		Verdict     string         `json:"verdict,omitempty"`
		Rule        string         `json:"rule,omitempty"`
		Refused     *traceRefusal  `json:"refused,omitempty"`
	}
	podName struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
		UID       string `json:"uid,omitempty"`
	}
	traceProcess struct {
		PID  int    `json:"pid"`
		Name string `json:"name"`
		UID  uint32 `json:"uid"`
		GID  uint32 `json:"gid"`
	}
	traceRefusal struct {
		Program string `json:"program"`
		Error   string `json:"error"`
		Text    string `json:"text"`
	}
	traceLost struct {
		Type  string    `json:"type"` // "lost"
		Time  time.Time `json:"time"`
		Count uint64    `json:"count"`
	}
	traceNotice struct {
		Type string    `json:"type"` // "notice"
		Time time.Time `json:"time"`
		Pod  *podName  `json:"pod,omitempty"`
		Text string    `json:"text"`
	}
)

// traceFormat is trace's -o: its output is no table, and JSON by the line.
type traceFormat string

func (f *traceFormat) String() string { return string(*f) }
func (f *traceFormat) Type() string   { return "text|json" }

func (f *traceFormat) Set(s string) error {
	if s != "text" && s != "json" {
		return errors.New("expected text or json")
	}
	*f = traceFormat(s)
	return nil
}

func newTraceCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "trace",
		Short: "show decisions as they fall",
		Long: `Shows each connection of this node's pods as it is decided: when, of which pod and
process, where to, the verdict, and the rule of the semantics that gave it; of one that
was refused, why. Pods that come meanwhile are shown too. It ends at an interrupt, with
--count or --for by itself.

It sees what eBPF decides. Of pods that iptables redirects it says so, and shows nothing.

Connections are decided as fast as ever: what can't be written in time is lost, and told.
While nobody traces, it costs nothing; a trace that was killed is off within 3 seconds.
Four can trace at once. It needs root, on the node itself.

Exit status: 0 it has ended as it should; 1 it failed, or --pod names a pod that can't be
traced; 2 bad usage or input.`,
		Example: `  # shunt trace --pod shop/reviews-v1-7f99cc4496-xk2lp --redirected --count 1
  TIME             POD                               PROCESS   DESTINATION   VERDICT  RULE
  08:12:01.734206  shop/reviews-v1-7f99cc4496-xk2lp  app/4711  10.99.3.4:80  OUT      out-include-cidr`,
	}
	var (
		confPath, pod      string
		direct, redirected bool
		t                  tracing
		duration           time.Duration
	)
	format := traceFormat("text")
	f := cmd.Flags()
	f.StringVar(&pod, "pod", "", "one pod, its `NS/NAME`; also one that is yet to come")
	f.BoolVar(&direct, "direct", false, "only what is not redirected")
	f.BoolVar(&redirected, "redirected", false, "only what is redirected")
	f.IntVar(&t.count, "count", 0, "end after `N` decisions")
	f.DurationVar(&duration, "for", 0, "end after a `TIME`, such as 30s")
	f.StringVar(&confPath, "netconf", "", "the plugin's configuration or the conflist that has it, a `FILE`; defaults without one")
	f.VarP(&format, "output", "o", "how to write it")
	return verb(cmd, func(cmd *cobra.Command) (err error) {
		switch {
		case direct && redirected:
			return usagef("--direct and --redirected: expected one of them, or neither for both")
		case t.count < 0:
			return usagef("--count %d: expected a positive number", t.count)
		case duration < 0:
			return usagef("--for %v: expected a positive time", duration)
		}
		if f.Changed("pod") {
			if t.pod, err = parsePodName(pod); err != nil {
				return err
			}
		}
		if t.conf, err = readConf(confPath, netconf.Parse); err != nil {
			return err
		}
		t.out, t.notes, t.json = cmd.OutOrStdout(), cmd.ErrOrStderr(), format == "json"
		ctx := cmd.Context()
		if duration > 0 {
			var cancel func()
			ctx, cancel = context.WithTimeout(ctx, duration)
			defer cancel()
		}
		return t.run(ctx, tracedRules(direct, redirected))
	})
}

// parsePodName reads --pod.
func parsePodName(s string) (*podName, error) {
	ns, name, ok := strings.Cut(s, "/")
	if !ok || ns == "" || name == "" || strings.Contains(name, "/") {
		return nil, usagef("--pod %q: expected NAMESPACE/NAME", s)
	}
	return &podName{Namespace: ns, Name: name}, nil
}

// tracedRules are those of the wished verdict. What is refused before it comes to a
// rule is wished in any case.
func tracedRules(direct, redirected bool) []bpf.ShuntRule {
	rules := []bpf.ShuntRule{bpf.ShuntRuleRULE_NONE}
	for _, r := range redirect.AllRules() {
		is := r.Verdict() == redirect.VerdictDirect
		if direct && !is || redirected && is {
			continue
		}
		rules = append(rules, bpf.ShuntRule(r))
	}
	return rules
}

// tracing is one run of trace.
type tracing struct {
	conf       *netconf.Config
	out, notes io.Writer
	json       bool
	pod        *podName // nil: all
	count      int      // of decisions to show; 0: any number

	tracer *trace.Tracer
	pods   map[uint64]*podName // by their network namespaces' cookies
	looked string              // what the records' folders looked like when they were read last
	told   map[string]bool     // notices
	widths [5]int
}

func (t *tracing) run(ctx context.Context, rules []bpf.ShuntRule) (err error) {
	t.told = map[string]bool{}
	all, err := findAttached(t.conf)
	if err != nil {
		return err
	}
	if err := t.untraceable(all); err != nil {
		return err
	}
	filter := trace.Filter{Rules: rules}
	if t.pod != nil {
		filter.Pods = []uint64{} // until look finds it
	}
	t.tracer, err = trace.New(loader.Options{BPFDir: t.conf.BPFDir, RunDir: t.conf.RunDir}, filter)
	if errors.Is(err, trace.ErrTracers) {
		return fmt.Errorf("%w: end one of them (`pgrep -af 'shunt trace'`)", err)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.tracer.Close()) }()
	if err := t.look(); err != nil {
		return err
	}
	if err := t.head(); err != nil { // which says that the pods that are there are shown from now on
		return err
	}
	for shown := 0; ctx.Err() == nil; {
		if err := t.look(); err != nil {
			return err
		}
		d, err := t.tracer.Read(time.Now().Add(lookEvery))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			return err
		}
		if err := t.show(&d); err != nil {
			return err
		}
		if shown++; shown == t.count {
			break
		}
	}
	return t.tellLost()
}

// byIptables says what there is in place of trace.
func byIptables(a *attached) string {
	return fmt.Sprintf("iptables redirects it, whose decisions can't be seen as they fall: `shunt status --pod %s/%s` counts them by rule, `nsenter --net=%s iptables-save -c` packets; annotation shunt.dev/datapath: ebpf has eBPF redirect it, where that serves the pod",
		a.pod.Namespace, a.pod.Name, a.iptables.Netns)
}

// untraceable fails for a pod that is named and that iptables redirects.
func (t *tracing) untraceable(all []*attached) error {
	for _, a := range all {
		if t.pod != nil && t.wishes(a) && a.ebpf == nil && a.iptables != nil {
			return fmt.Errorf("pod %s/%s can't be traced: %s", t.pod.Namespace, t.pod.Name, byIptables(a))
		}
	}
	return nil
}

func (t *tracing) wishes(a *attached) bool {
	return t.pod == nil || a.pod.Namespace == t.pod.Namespace && a.pod.Name == t.pod.Name
}

// look reads the records, if they have changed, and tells of what it can't show.
func (t *tracing) look() error {
	if err := t.tellLost(); err != nil {
		return err
	}
	now, settled := fmt.Sprint(t.tracer.Loaded()), true
	for _, dir := range []string{"attachments", "iptables"} {
		// A record comes, and goes, by a rename or an unlink: the folder's time tells.
		info, err := os.Stat(filepath.Join(t.conf.RunDir, dir))
		if err == nil {
			now += fmt.Sprint(" ", info.ModTime().UnixNano())
			settled = settled && time.Since(info.ModTime()) > settleTime
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if now == t.looked {
		return nil
	}
	all, err := findAttached(t.conf)
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(a *attached) bool { return !t.wishes(a) })
	if t.looked = now; !settled {
		t.looked = ""
	}
	t.pods = map[uint64]*podName{}
	cookies := []uint64{}
	own := loader.ThisBuild()
	for _, a := range all {
		pod := &podName{Namespace: a.pod.Namespace, Name: a.pod.Name, UID: a.pod.UID}
		switch {
		case a.ebpf == nil:
			err = t.notice(pod, "is not shown: "+byIptables(a))
		case a.ebpf.Build != own:
			err = t.notice(pod, fmt.Sprintf("is not shown: the datapath of another build of shunt redirects it (%s; this one's is %s), whose `shunt trace` shows it", a.ebpf.Build, own))
		default:
			t.pods[a.ebpf.Cookie] = pod
			if !slices.Contains(cookies, a.ebpf.Cookie) {
				cookies = append(cookies, a.ebpf.Cookie)
			}
		}
		if err != nil {
			return err
		}
	}
	if !t.tracer.Loaded() {
		err = t.notice(nil, "no eBPF datapath of this build is loaded here yet: what it decides is shown from when it is")
	} else if t.pod != nil && len(t.pods) == 0 && len(all) == 0 {
		err = t.notice(t.pod, "is not redirected here (yet): it is shown from when it is")
	}
	if err != nil || t.pod == nil {
		return err
	}
	return t.tracer.SetPods(cookies)
}

// notice tells something once.
func (t *tracing) notice(pod *podName, text string) error {
	key := pod.String() + " " + text
	if t.told[key] {
		return nil
	}
	t.told[key] = true
	if t.json {
		return t.line(traceNotice{Type: "notice", Time: time.Now(), Pod: pod, Text: text})
	}
	if pod != nil {
		text = "pod " + pod.String() + " " + text
	}
	_, err := fmt.Fprintf(t.notes, "shunt: %s\n", text)
	return err
}

func (t *tracing) tellLost() error {
	n := t.tracer.Lost()
	if n == 0 {
		return nil
	}
	if t.json {
		return t.line(traceLost{Type: "lost", Time: time.Now(), Count: n})
	}
	_, err := fmt.Fprintf(t.notes, "shunt: %d decisions were lost: they fell faster than they could be written\n", n)
	return err
}

func (t *tracing) line(v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return err
	}
	_, err := t.out.Write(escapeC1(b.Bytes()))
	return err
}

// escapeC1 escapes in a line of JSON what terminals may take for control and the
// encoder leaves as it is: DEL and the C1 controls. It says the same then.
func escapeC1(line []byte) []byte {
	if !bytes.ContainsFunc(line, isC1) {
		return line
	}
	var out []byte
	for _, r := range string(line) {
		if isC1(r) {
			out = fmt.Appendf(out, `\u%04x`, r)
		} else {
			out = utf8.AppendRune(out, r)
		}
	}
	return out
}

func isC1(r rune) bool { return r >= 0x7f && r <= 0x9f }

// newTraced is what trace writes of a decision.
func newTraced(d *trace.Decision, pod *podName) *traced {
	x := &traced{
		Type: "decision", Time: d.Time, Pod: pod,
		Direction: redirect.Outbound.String(), Proto: redirect.TCP.String(), Destination: d.Dst,
	}
	if d.Protocol == unix.IPPROTO_UDP {
		x.Proto = redirect.UDP.String()
	}
	if d.Interface != 0 {
		x.Direction, x.Source, x.Interface = redirect.Inbound.String(), d.Src, d.Interface
	} else {
		x.Process = &traceProcess{PID: d.PID, Name: strings.ToValidUTF8(d.Command, "\uFFFD"), UID: d.UID, GID: d.GID}
	}
	if d.Rule != bpf.ShuntRuleRULE_NONE {
		r := redirect.Rule(d.Rule)
		x.Verdict, x.Rule = r.Verdict().String(), r.String()
	}
	if f := d.Failure; f != nil {
		x.Refused = &traceRefusal{Program: f.Program(), Error: f.Name(), Text: f.Text()}
	}
	return x
}

func (t *tracing) show(d *trace.Decision) error {
	pod := t.pods[d.Cookie]
	if pod == nil {
		// It may have come since the last look: its record was there before its
		// programs were.
		if err := t.look(); err != nil {
			return err
		}
		pod = t.pods[d.Cookie]
	}
	x := newTraced(d, pod)
	if t.json {
		return t.line(x)
	}
	return t.row(x.cells())
}

func (p *podName) String() string {
	if p == nil || p.Name == "" {
		return "?"
	}
	return p.Namespace + "/" + p.Name
}

func (t *tracing) head() error {
	if t.json {
		return nil
	}
	t.widths = [5]int{len("08:12:01.734206"), len("shop/reviews-v1-7f99cc4496-xk2lp"), len("app/4711"), len("10.99.3.4:80"), len("VERDICT")}
	return t.row([6]string{"TIME", "POD", "PROCESS", "DESTINATION", "VERDICT", "RULE"})
}

// row writes a line. A column becomes as wide as its widest cell so far.
func (t *tracing) row(cells [6]string) error {
	var b strings.Builder
	for i := range t.widths {
		t.widths[i] = max(t.widths[i], len([]rune(cells[i])))
		fmt.Fprintf(&b, "%-*s  ", t.widths[i], cells[i])
	}
	b.WriteString(cells[5] + "\n")
	_, err := io.WriteString(t.out, b.String())
	return err
}

// cells are a decision for people.
func (x *traced) cells() [6]string {
	who := "from " + x.Source.String()
	if x.Process != nil {
		who = fmt.Sprintf("%s/%d", printable(x.Process.Name), x.Process.PID)
	}
	to := x.Destination.String()
	if x.Proto != redirect.TCP.String() {
		to += "/" + x.Proto
	}
	rule := cmp.Or(x.Rule, "-")
	if x.Refused != nil {
		rule += fmt.Sprintf("; refused by %s, %s: %s", x.Refused.Program, x.Refused.Error, x.Refused.Text)
	}
	return [6]string{x.Time.Local().Format("15:04:05.000000"), x.Pod.String(), who, to, cmp.Or(x.Verdict, "-"), rule}
}

// printable takes what could steer a terminal out of a process's name, which is
// the pod's to choose.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsGraphic(r) {
			return r
		}
		return '?'
	}, s)
}
