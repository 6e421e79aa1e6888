// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"maps"
	"time"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/ebpf"
)

// upgradeInterval is how often the agent looks for pods with another build's
// programs: those that ran when it came, and those that a plugin of another build has
// set up since. Where there are none it costs to list one directory.
const upgradeInterval = 10 * time.Second

// tidyEvery is how many of these lie between two looks for what is left of pods that
// are gone.
const tidyEvery = 6

// upkeepTimeout bounds one look; what is not done is done at the next.
const upkeepTimeout = time.Minute

// An upkeeper keeps what eBPF has made for pods as this build has it: pods that
// another build redirects get its programs, and what is left of pods whose DEL never
// came is removed.
type upkeeper struct {
	config *configFile
	// mine says that the node is this agent's: an earlier one, which is about to end,
	// must not take back what a later one does.
	mine    func() bool
	upgrade func(context.Context, *config) (*loader.Upgraded, error)
	sweep   func(context.Context, *config) ([]redirect.Attachment, error)
	log     *slog.Logger

	looks int
	kept  map[loader.ID]string // why, as it was told
	said  map[string]string    // errors, by what failed
}

func newUpkeeper(f *configFile, runDir string, mine func() bool, log *slog.Logger) *upkeeper {
	node := func(c *config) *ebpf.Backend {
		return ebpf.New(loader.Options{BPFDir: c.BPFDir, RunDir: runDir, Log: log, Programs: programs.New()})
	}
	return &upkeeper{
		config: f, mine: mine, log: log, kept: map[loader.ID]string{}, said: map[string]string{},
		upgrade: func(ctx context.Context, c *config) (*loader.Upgraded, error) { return node(c).Upgrade(ctx) },
		sweep:   func(ctx context.Context, c *config) ([]redirect.Attachment, error) { return node(c).Sweep(ctx) },
	}
}

// configOf reads the netconf once. Without a valid one the defaults are in force.
func configOf(opts Options) *configFile {
	f := newConfigFile(opts.Netconf, opts.RunDir, slog.New(slog.DiscardHandler))
	if opts.Netconf != "" {
		f.read()
	}
	if c, _ := f.get(); c == nil {
		f.now = &config{Config: netconf.Default()}
	}
	return f
}

func (u *upkeeper) run(ctx context.Context, beat func()) error {
	return every(ctx, upgradeInterval, beat, u.look)
}

func (u *upkeeper) look(ctx context.Context) {
	c, _ := u.config.get()
	if c == nil || !u.mine() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, upkeepTimeout)
	defer cancel()
	done, err := u.upgrade(ctx, c)
	u.say(ctx, "pods keep another build's programs; it is tried again", err)
	u.tell(done, err == nil)
	if u.looks++; u.looks%tidyEvery == 1 {
		u.tidy(ctx, c)
	}
}

// sweepOnce looks for what is left of pods that are gone.
func (u *upkeeper) sweepOnce(ctx context.Context) {
	c, _ := u.config.get()
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	u.tidy(ctx, c)
}

func (u *upkeeper) tidy(ctx context.Context, c *config) {
	removed, err := u.sweep(ctx, c)
	for _, a := range removed {
		u.log.Info("removed what was left of a pod that is gone", "container", a.ContainerID, "interface", a.IfName)
	}
	u.say(ctx, "what is left of pods that are gone can't be removed, or not all of it", err)
}

// tell says what became of pods that had another build's programs. What has been said
// of a pod is not said again.
func (u *upkeeper) tell(done *loader.Upgraded, whole bool) {
	if n := len(done.Moved); n > 0 {
		u.log.Info("pods have this build's programs now", "pods", n)
	}
	now := map[loader.ID]bool{}
	for _, k := range done.Kept {
		now[k.ID] = true
		why := k.Why.Error()
		if u.kept[k.ID] != why {
			u.kept[k.ID] = why
			u.log.Warn("a pod keeps another build's programs: it goes on to work", "pod", k.Pod.Namespace+"/"+k.Pod.Name,
				"build", k.Build, "why", k.Why, "container", k.ContainerID)
		}
	}
	if whole { // else it has not looked at all of them
		maps.DeleteFunc(u.kept, func(id loader.ID, _ string) bool { return !now[id] })
	}
}

// say logs an error when it is another than the last.
func (u *upkeeper) say(ctx context.Context, msg string, err error) {
	if err == nil {
		delete(u.said, msg)
		return
	}
	if text := err.Error(); u.said[msg] != text && ctx.Err() == nil {
		u.said[msg] = text
		u.log.Warn(msg, "error", err)
	}
}
