// SPDX-License-Identifier: Apache-2.0

package backends

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

// A fake is a backend that writes down what is asked of it, in a diary that two
// of them share.
type fake struct {
	name  string
	diary *[]string
	fails map[string]error // by verb
	knows bool
	has   []redirect.Attachment
}

func (f *fake) do(verb string) error {
	*f.diary = append(*f.diary, f.name+" "+verb)
	return f.fails[verb]
}

func (f *fake) Apply(context.Context, redirect.Target, *redirect.Policy) error { return f.do("apply") }

func (f *fake) Check(context.Context, redirect.Target) error { return f.do("check") }

func (f *fake) Remove(context.Context, redirect.Attachment) error { return f.do("remove") }

func (f *fake) Yield(context.Context, redirect.Attachment, bool) error { return f.do("yield") }

func (f *fake) TakeOver(context.Context, redirect.Target, *redirect.Policy) error {
	return f.do("take over")
}

func (f *fake) Restore(context.Context, redirect.Attachment) error { return f.do("restore") }

func (f *fake) Ready(context.Context) error { return f.do("ready") }

func (f *fake) Knows(redirect.Attachment) bool { return f.knows }

func (f *fake) Attachments(context.Context, string) ([]redirect.Attachment, error) {
	return f.has, f.do("list")
}

// both makes fakes of the two, which fail at verbs such as "ebpf apply".
func both(fails map[string]error) (b *Backends, diary *[]string, log *bytes.Buffer) {
	diary, log = new([]string), new(bytes.Buffer)
	of := func(name string) *fake {
		f := &fake{name: name, diary: diary, fails: map[string]error{}, knows: true}
		for what, err := range fails {
			if verb, ok := strings.CutPrefix(what, name+" "); ok {
				f.fails[verb] = err
			}
		}
		return f
	}
	ipt := of("iptables")
	return &Backends{ebpf: of("ebpf"), iptables: ipt, yield: ipt.Yield, takeOver: ipt.TakeOver, restore: ipt.Restore, log: slog.New(slog.NewTextHandler(log, nil))}, diary, log
}

func TestApply(t *testing.T) {
	by := redirect.Reasons{{Name: redirect.ReasonConfigured, Text: "x"}}
	auto := redirect.Choice{Datapath: redirect.EBPF, Hook: redirect.HookSkLookup, Fallback: true, Reasons: by}
	ebpf := redirect.Choice{Datapath: redirect.EBPF, Hook: redirect.HookSkLookup, Reasons: by}
	iptables := redirect.Choice{Datapath: redirect.Iptables, Reasons: by}
	tookOver := func(name redirect.ReasonName, err error) redirect.Choice {
		return redirect.Choice{Datapath: redirect.Iptables, Reasons: redirect.Reasons{{Name: name, Text: "eBPF has failed: " + err.Error()}}}
	}
	refused := fmt.Errorf("load: %w", loader.ErrRefused)
	other := errors.New("EIO")
	for _, tc := range []struct {
		name   string
		choice redirect.Choice
		fails  map[string]error
		want   redirect.Choice
		did    []string
		errors []string
	}{
		{name: "eBPF", choice: auto, want: auto, did: []string{"ebpf apply", "iptables yield"}},
		{name: "iptables", choice: iptables, want: iptables, did: []string{"iptables take over", "ebpf remove"}},
		{
			name: "iptables takes over", choice: auto, fails: map[string]error{"ebpf apply": refused}, want: tookOver(redirect.ReasonLoadRefused, refused),
			did: []string{"ebpf apply", "iptables take over", "ebpf remove"},
		},
		{
			name: "for whatever reason", choice: auto, fails: map[string]error{"ebpf apply": other}, want: tookOver(redirect.ReasonFailed, other),
			did: []string{"ebpf apply", "iptables take over", "ebpf remove"},
		},
		{name: "eBPF is asked for", choice: ebpf, fails: map[string]error{"ebpf apply": refused}, did: []string{"ebpf apply", "iptables restore"}, errors: []string{"datapath ebpf: load: the kernel refuses"}},
		{
			name: "eBPF is not undone", choice: auto, fails: map[string]error{"ebpf apply": fmt.Errorf("%w; %w", other, loader.ErrNotUndone)},
			did: []string{"ebpf apply", "iptables restore"}, errors: []string{"EIO; not undone"},
		},
		{
			name: "neither", choice: auto, fails: map[string]error{"ebpf apply": refused, "iptables take over": other},
			did: []string{"ebpf apply", "iptables take over"}, errors: []string{"datapath ebpf: load", "iptables, which was to take over: EIO"},
		},
		{name: "iptables fails", choice: iptables, fails: map[string]error{"iptables take over": other}, did: []string{"iptables take over"}, errors: []string{"datapath iptables: EIO"}},
		{name: "the other stays", choice: iptables, fails: map[string]error{"ebpf remove": other}, did: []string{"iptables take over", "ebpf remove"}, errors: []string{"EIO"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b, did, log := both(tc.fails)
			got, err := b.Apply(t.Context(), redirect.Target{}, new(redirect.Policy), tc.choice)
			if (err != nil) != (len(tc.errors) > 0) {
				t.Errorf("error %v", err)
			}
			for _, e := range tc.errors {
				if !strings.Contains(fmt.Sprint(err), e) {
					t.Errorf("error %v, want %s", err, e)
				}
			}
			if diff := cmp.Diff(tc.want, got); err == nil && diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(tc.did, *did); diff != "" {
				t.Error(diff)
			}
			took := slices.Contains(*did, "ebpf apply") && slices.Contains(*did, "iptables take over")
			if told := strings.Contains(log.String(), "iptables takes over"); told != took {
				t.Errorf("logged %s", log)
			}
		})
	}
	t.Run("nothing of the other's", func(t *testing.T) {
		b, did, _ := both(nil)
		b.ebpf.(*fake).knows, b.iptables.(*fake).knows = false, false
		for _, c := range []redirect.Choice{auto, iptables} {
			if _, err := b.Apply(t.Context(), redirect.Target{}, new(redirect.Policy), c); err != nil {
				t.Error(err)
			}
		}
		if diff := cmp.Diff([]string{"ebpf apply", "iptables apply"}, *did); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("TPROXY mode's marks are of both", func(t *testing.T) {
		b, did, _ := both(nil)
		for _, c := range []redirect.Choice{auto, iptables} {
			if _, err := b.Apply(t.Context(), redirect.Target{}, &redirect.Policy{Mode: redirect.ModeTProxy}, c); err != nil {
				t.Error(err)
			}
		}
		if diff := cmp.Diff([]string{
			"ebpf apply", "iptables yield", "ebpf apply",
			"iptables take over", "ebpf remove", "iptables apply",
		}, *did); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("the caller's time is up", func(t *testing.T) {
		b, did, _ := both(map[string]error{"ebpf apply": context.Canceled})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := b.Apply(ctx, redirect.Target{}, nil, auto); err == nil || !slices.Equal(*did, []string{"ebpf apply", "iptables restore"}) {
			t.Errorf("error %v, did %v", err, *did)
		}
	})
}

func TestOthers(t *testing.T) {
	none := fmt.Errorf("x: %w", redirect.ErrNotProgrammed)
	differs := errors.New("differs")
	for _, tc := range []struct {
		name  string
		fails map[string]error
		do    func(b *Backends) error
		did   []string
		want  string // empty: no error
	}{
		{"check eBPF", nil, func(b *Backends) error { return b.Check(t.Context(), redirect.Target{}) }, []string{"ebpf check"}, ""},
		{"check iptables", map[string]error{"ebpf check": none}, func(b *Backends) error { return b.Check(t.Context(), redirect.Target{}) }, []string{"ebpf check", "iptables check"}, ""},
		{"eBPF differs", map[string]error{"ebpf check": differs}, func(b *Backends) error { return b.Check(t.Context(), redirect.Target{}) }, []string{"ebpf check"}, "differs"},
		{"iptables differs", map[string]error{"ebpf check": none, "iptables check": differs}, func(b *Backends) error { return b.Check(t.Context(), redirect.Target{}) }, []string{"ebpf check", "iptables check"}, "differs"},
		{"nothing", map[string]error{"ebpf check": none, "iptables check": none}, func(b *Backends) error { return b.Check(t.Context(), redirect.Target{}) }, []string{"ebpf check", "iptables check"}, none.Error()},
		{"remove", map[string]error{"ebpf remove": differs}, func(b *Backends) error { return b.Remove(t.Context(), redirect.Attachment{}) }, []string{"ebpf remove", "iptables remove"}, "differs"},
		{"ready", nil, ready("auto", ""), []string{"ebpf ready"}, ""},
		{"ready, without eBPF", map[string]error{"ebpf ready": loader.ErrNoBPFFS}, ready("auto", redirect.ReasonNoBPFFS), []string{"ebpf ready", "iptables ready"}, ""},
		{"not ready", map[string]error{"ebpf ready": loader.ErrNoBPFFS, "iptables ready": differs}, ready("auto", ""), []string{"ebpf ready", "iptables ready"}, "datapath ebpf: no bpffs; datapath iptables: differs"},
		{"ready for iptables", nil, ready("iptables", ""), []string{"iptables ready"}, ""},
		{"not ready for eBPF", map[string]error{"ebpf ready": loader.ErrNoBPFFS}, ready("ebpf", ""), []string{"ebpf ready"}, "no bpffs"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b, did, _ := both(tc.fails)
			if err := tc.do(b); (err == nil) != (tc.want == "") || err != nil && err.Error() != tc.want {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if diff := cmp.Diff(tc.did, *did); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func ready(datapath string, want redirect.ReasonName) func(b *Backends) error {
	return func(b *Backends) error {
		reason, err := b.Ready(context.Background(), datapath)
		if err == nil && (reason == nil) != (want == "") || reason != nil && reason.Name != want {
			return fmt.Errorf("reason %v, want %q", reason, want)
		}
		return err
	}
}
