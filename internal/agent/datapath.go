// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"shunt.dev/shunt/internal/answer"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/ebpf"
)

// readyInterval is how often the agent sees to it that the datapath is loaded:
// somebody may have unmounted the bpffs, or removed what is in it. It costs a
// few system calls where all is well.
const readyInterval = 10 * time.Second

// readyTimeout bounds one load, the wait for the node's lock included.
const readyTimeout = time.Minute

// A preloader has the eBPF datapath loaded before a pod needs it, and again when
// it is gone. iptables needs no preparation; and whether the node's own programs
// work, the agent can't tell: it has others, of its image.
type preloader struct {
	config *configFile
	// ready loads the datapath, unless it is loaded.
	ready func(context.Context, *config) error
	// said is the plugin's last answer to STATUS, nil where there is none.
	said  func() (*answer.Status, error)
	log   *slog.Logger
	first chan struct{} // closed after the first attempt
	once  sync.Once

	mu   sync.Mutex
	ok   bool
	text string
}

func newPreloader(f *configFile, runDir string, log *slog.Logger) *preloader {
	withoutTC := false
	return &preloader{
		config: f, log: log, first: make(chan struct{}), text: "not tried yet",
		ready: func(ctx context.Context, c *config) error {
			b := ebpf.New(loader.Options{BPFDir: c.BPFDir, RunDir: runDir, Log: log, Programs: programs.New()})
			err := b.Ready(ctx)
			switch hook := redirect.Hook(c.InboundHook); {
			case err != nil || hook == redirect.HookSkLookup:
			case hook == redirect.HookTC:
				err = b.ReadyTC(ctx)
			case !withoutTC:
				// A pod may ask for it by its annotation; no other is concerned
				// where that can't be had, and it need not be tried for ever.
				if err := b.ReadyTC(ctx); err != nil {
					withoutTC = true
					log.Info("the TC program can't be loaded ahead of a pod that asks for it", "error", err)
				}
			}
			return err
		},
		said: func() (*answer.Status, error) { return answer.Read(runDir) },
	}
}

// condition is what /readyz says: what the agent has found, and above it what
// the plugin has answered to STATUS of late. That one knows better: it has all
// rights, and the node's own programs of iptables.
func (p *preloader) condition() (ok bool, text string) {
	ok, text = p.found()
	said, err := p.said()
	if err != nil {
		return ok, fmt.Sprintf("%s (%v)", text, err)
	}
	if said == nil || time.Since(said.At) > answer.Fresh {
		return ok, text
	}
	if c, _ := p.config.get(); c == nil || said.Datapath != c.Datapath {
		return ok, text // it was asked by another netconf
	}
	switch {
	case !said.Able:
		return false, "no pod can be set up, as the plugin answers STATUS: " + said.Text
	case !ok:
		return true, fmt.Sprintf("%s, as the plugin answers STATUS (in the agent: %s)", said.Text, text)
	}
	return true, text
}

func (p *preloader) found() (ok bool, text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ok, p.text
}

func (p *preloader) run(ctx context.Context, beat func()) error {
	for {
		beat()
		c, changed := p.config.get()
		if c != nil {
			p.try(ctx, c)
			p.once.Do(func() { close(p.first) })
		}
		if !wait(ctx, readyInterval, changed) {
			return ctx.Err()
		}
	}
}

// try loads the datapath and says what that means for pods.
func (p *preloader) try(ctx context.Context, c *config) {
	if redirect.Datapath(c.Datapath) == redirect.Iptables {
		p.note(slog.LevelInfo, true, "pods get iptables: datapath iptables (netconf)")
		return
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	err := p.ready(ctx, c)
	if err == nil {
		p.note(slog.LevelInfo, true, "the eBPF datapath is loaded")
		return
	}
	reason := ebpf.Reason(err)
	switch {
	case redirect.Datapath(c.Datapath) == redirect.EBPF:
		p.note(slog.LevelError, false, fmt.Sprintf("the eBPF datapath can't be loaded, and datapath ebpf (netconf) allows no other (%s): %v", reason.Name, err))
	case reason.Name == redirect.ReasonFailed:
		p.note(slog.LevelError, false, fmt.Sprintf("the eBPF datapath could not be loaded: %v", err))
	default:
		p.note(slog.LevelWarn, true, fmt.Sprintf("the eBPF datapath can't be loaded by the agent; where the plugin can't either, pods get iptables (%s): %v", reason.Name, err))
	}
}

// note keeps what is, and logs it when it is new.
func (p *preloader) note(level slog.Level, ok bool, text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if text == p.text {
		return
	}
	p.ok, p.text = ok, text
	p.log.Log(context.Background(), level, text)
}
