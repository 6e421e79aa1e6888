// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"shunt.dev/shunt/internal/kubeapi"
	"shunt.dev/shunt/internal/rundir"
	"shunt.dev/shunt/redirect"
)

// Options say what is to be where. Paths are as this process sees them.
type Options struct {
	// BinDir and ConfDir are the runtime's directories of CNI plugins and of
	// their configuration. RunDir is the plugin's.
	BinDir, ConfDir, RunDir string
	// ConfFile is the name of the file in ConfDir to join, or, where Chained is
	// false, to write. Empty, with Chained: the first that runtimes would take.
	ConfFile string
	// Chained: become the last plugin of a configuration that others made.
	// Otherwise a file of its own is written.
	Chained bool
	// Entry is the plugin's network configuration, a JSON object. Agent is added to
	// what is installed (netconf.AgentArg).
	Entry []byte
	// BinariesDir is where the binaries are copied from.
	BinariesDir string
	// CacheDir is libcni's cache (/var/lib/cni on most nodes), which tells Uninstall
	// whether the runtime may still call the plugin. Empty: it can't be told, and
	// the plugin's binary stays.
	CacheDir string
	// Agent is the DaemonSet that this process is of.
	Agent      redirect.AgentRef
	Kubeconfig KubeconfigOptions
	// OnResult, if there is one, gets one of the Result constants whenever
	// something was done, or could not be.
	OnResult func(result string)
	Log      *slog.Logger
}

// Results are what OnResult gets, for a metric's label.
const (
	ResultInstalled  = "installed"         // all is in its place, for the first time
	ResultUpdated    = "updated"           // binaries, kubeconfig or agent file were written anew
	ResultHealed     = "healed"            // the entry was put back, or into another file
	ResultWaiting    = "waiting"           // there is nothing to join yet, or a later agent is to mend what is amiss
	ResultFight      = "fight"             // somebody keeps undoing it
	ResultRunDir     = "run-dir-failed"    // the run directory can't be used
	ResultBinaries   = "binaries-failed"   // the binaries could not be copied
	ResultKubeconfig = "kubeconfig-failed" // the kubeconfig could not be written
	ResultConf       = "conf-failed"       // the CNI configuration could not be read or written
)

// State says how things are.
type State struct {
	// Installed: the binaries and the entry are in their places.
	Installed bool
	// File is the file that has the entry, or is to get it; its path.
	File string
	// Err says what is wrong or waited for. It may be there beside Installed.
	Err error
	// Behind: a later agent has the node, and this one changes nothing.
	Behind bool
	// Since is since when this has been so.
	Since time.Time
}

// times are how long things take. Tests have shorter ones.
type times struct {
	verify time.Duration // between looks that nothing has asked for
	settle time.Duration // how long a directory has to stay as it is before another file is taken
	gap    time.Duration // the least between two looks
	retry  time.Duration // the first pause after a failure, which doubles up to retryMax
	quick  time.Duration // undone sooner than this, it is a fight
	calm   time.Duration // after which a fight is over

	retryMax time.Duration
	leave    time.Duration // how long a runtime may take to notice that the entry is gone
	back     time.Duration // between looks whether a later agent still has the node
}

var realTimes = times{
	verify: time.Minute, settle: 500 * time.Millisecond, gap: 50 * time.Millisecond,
	retry: time.Second, retryMax: 5 * time.Minute, quick: 10 * time.Second, calm: time.Minute, leave: 10 * time.Second,
	back: 5 * time.Second,
}

// An Installer puts the plugin on the node.
type Installer struct {
	opts   Options
	times  times
	copier copier
	start  int64 // of the process; see claim

	// Of Run alone.
	held     *os.File // the claim
	behind   string   // whose claim keeps this one back
	fight    fight
	fighting bool              // was told of
	joined   string            // the file that has the entry
	done     bool              // everything was once in its place
	noted    map[string]string // what was logged, by file
	settling string            // what is about to be done, and when it was first
	since    time.Time
	failures int // in a row

	mu    sync.Mutex
	state State
}

// New checks the options. Nothing is done yet.
func New(opts Options) (*Installer, error) {
	opts.defaults()
	if err := opts.validate(); err != nil {
		return nil, fmt.Errorf("install: %w", err)
	}
	var err error
	if opts.Entry, err = withAgent(opts.Entry, opts.Agent); err != nil {
		return nil, fmt.Errorf("install: netconf: %w", err)
	}
	in := &Installer{
		opts: opts, times: realTimes, start: processStart, copier: copier{from: opts.BinariesDir, to: opts.BinDir}, noted: map[string]string{},
		state: State{Err: errors.New("nothing has been looked at yet"), Since: time.Now()},
	}
	return in, nil
}

func (o *Options) defaults() {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.OnResult == nil {
		o.OnResult = func(string) {}
	}
}

func (o *Options) checkDirs() error {
	for _, d := range []struct{ name, path string }{
		{"CNI plugin directory (cniBinDir)", o.BinDir},
		{"CNI configuration directory (cniConfDir)", o.ConfDir},
		{"run directory (runDir)", o.RunDir},
	} {
		if !filepath.IsAbs(d.path) {
			return fmt.Errorf("%s: %q is not an absolute path", d.name, d.path)
		}
	}
	return nil
}

func (o *Options) validate() error {
	if err := o.checkDirs(); err != nil {
		return err
	}
	switch {
	case !filepath.IsAbs(o.BinariesDir):
		return fmt.Errorf("directory of the binaries: %q is not an absolute path", o.BinariesDir)
	case o.ConfFile == "" && !o.Chained:
		return errors.New("cniConfFileName: none is given: with chained=false expected the name of the file to write, such as shunt-cni.conf")
	case o.ConfFile != "" && (filepath.Base(o.ConfFile) != o.ConfFile || !isConf(o.ConfFile)):
		return fmt.Errorf("cniConfFileName: %q is not the name of a file that ends in .conf, .conflist or .json", o.ConfFile)
	case o.Agent.Namespace == "" || o.Agent.DaemonSet == "":
		return fmt.Errorf("agent: %q/%q is not a namespace and a DaemonSet's name", o.Agent.Namespace, o.Agent.DaemonSet)
	}
	if err := checkEntry(o.Entry); err != nil {
		return fmt.Errorf("netconf: %w", err)
	}
	return o.Kubeconfig.validate()
}

func (o *Options) wish() wish { return wish{chained: o.Chained, file: o.ConfFile, entry: o.Entry} }

// State says how things are. It may be called at any time.
func (in *Installer) State() State {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.state
}

func (in *Installer) set(s State) {
	in.mu.Lock()
	defer in.mu.Unlock()
	same := s.Installed == in.state.Installed && s.File == in.state.File && text(s.Err) == text(in.state.Err)
	if s.Since = in.state.Since; !same {
		s.Since = time.Now()
	}
	in.state = s
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// errGone says that a directory can't come back for this process.
var errGone = errors.New("it was removed on the node: the volume has to be mounted anew, by a restart of the container")

// Run installs, and keeps it so until ctx is done; then it returns nil, and
// leaves everything where it is. It fails only where nothing but a restart of
// the container can help.
func (in *Installer) Run(ctx context.Context) error {
	w := &watch{log: in.opts.Log}
	defer w.close()
	defer in.release()
	in.fight.times = in.times
	var links []string
	for {
		w.cover(in.watched(links))
		out := in.pass(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(out.err, errGone) {
			in.set(State{File: in.joined, Err: out.err})
			return out.err
		}
		in.report(out)
		fresh := !slices.Equal(links, out.links)
		if links = out.links; fresh {
			continue // watched before they are looked at
		}
		pause, gap := in.pause(out, w.complete())
		if !in.wait(ctx, w, pause, gap) {
			return nil
		}
	}
}

// watched says what is to be watched: directories, and the names in them that
// count.
func (in *Installer) watched(links []string) map[string][]string {
	names := map[string][]string{
		in.opts.ConfDir: {"*.conf", "*.conflist", "*.json"},
		in.opts.BinDir:  binaries,
	}
	add := func(dir string, n ...string) {
		if before, ok := names[dir]; ok && len(before) == 0 || len(n) == 0 {
			names[dir] = nil
		} else {
			names[dir] = slices.Concat(before, n)
		}
	}
	add(in.opts.RunDir, agentFile)
	if k := in.opts.Kubeconfig; k.Path != "" {
		add(filepath.Dir(k.Path), filepath.Base(k.Path))
		if dir := filepath.Dir(k.TokenFile); dir == in.opts.RunDir {
			add(dir, filepath.Base(k.TokenFile)) // much else is written there
		} else {
			// All names: a projected volume changes by a link named ..data.
			add(dir)
		}
		if k.CAFile != "" && !k.Insecure {
			add(filepath.Dir(k.CAFile))
		}
	}
	for _, l := range links {
		add(l)
	}
	return names
}

// An outcome is what came of one pass.
type outcome struct {
	result    string // a Result constant, or "": nothing to tell
	installed bool
	err       error
	links     []string
	// again is when to look again though nothing calls for it; 0: after a while.
	again time.Duration
	back  bool // a later agent has the node
}

// pass looks at everything, in an order in which nothing is ever there that
// needs what is not: the run directory, the binaries, the kubeconfig, the entry.
// What can be done in spite of a failure is done.
func (in *Installer) pass(ctx context.Context) (out outcome) {
	if err := in.gone(); err != nil {
		return outcome{result: ResultConf, err: err}
	}
	if err := rundir.Prepare(in.opts.RunDir); err != nil {
		return outcome{result: ResultRunDir, err: fmt.Errorf("run directory: %w", explain(err))}
	}
	release, err := lock(ctx, in.opts.RunDir)
	if err != nil {
		return outcome{result: ResultRunDir, err: fmt.Errorf("run directory: %w", err)}
	}
	defer release()
	other, err := in.claim()
	if err != nil {
		return outcome{result: ResultRunDir, err: fmt.Errorf("run directory: claim the node: %w", err)}
	}
	if other != nil {
		return in.standBack(other)
	}
	if in.behind != "" {
		in.behind = ""
		in.opts.Log.Warn("the other agent has gone: this one has the node again")
	}
	updated, err := writeAgent(in.opts.RunDir, in.opts.Agent)
	if err != nil {
		return outcome{result: ResultRunDir, err: fmt.Errorf("run directory: write the agent's name: %w", err)}
	}

	dir := confDir(in.opts.ConfDir)
	files, links, marks, err := dir.read()
	if err != nil {
		return outcome{result: ResultConf, err: fmt.Errorf("read the CNI configuration: %w", err)}
	}
	if err := sweep(append(in.opts.dirs(), links...)...); err != nil {
		in.note("", fmt.Sprintf("what an earlier process has left can't be removed: %v", err))
	}
	p, err := decide(files, in.opts.wish())
	if err != nil {
		return outcome{result: ResultConf, err: fmt.Errorf("plan the CNI configuration: %w", err)}
	}
	for name, note := range p.notes {
		in.note(name, note)
	}

	// A newer build's entry may have what this build's plugin does not know: the
	// old configuration goes before the old binary.
	var conf *outcome
	if _, err := os.Stat(filepath.Join(in.opts.BinDir, pluginType)); p.newer && err == nil {
		done := in.configure(dir, p, marks)
		if conf = &done; done.err != nil || !done.installed {
			done.links = links
			return done
		}
	}
	copied, err := in.copier.copy()
	if err != nil {
		return outcome{result: ResultBinaries, err: explain(err), links: links}
	}
	written, kubeErr := in.opts.Kubeconfig.write()
	if kubeErr != nil {
		kubeErr = fmt.Errorf("write kubeconfig: %w", kubeErr)
		// An older one may still do; the entry must not wait for a better one.
		if kubeapi.CheckConfig(in.opts.Kubeconfig.Path) != nil {
			return outcome{result: ResultKubeconfig, err: kubeErr, links: links}
		}
	}
	if conf == nil {
		done := in.configure(dir, p, marks)
		conf = &done
	}
	out = *conf
	out.links = links
	if out.err == nil && kubeErr != nil {
		out.result, out.err = ResultKubeconfig, kubeErr
	}
	if out.result == "" && (updated || copied || written) {
		out.result = ResultUpdated
	}
	return out
}

// configure brings the CNI configuration to what is planned.
func (in *Installer) configure(dir confDir, p plan, marks []string) (out outcome) {
	now := time.Now()
	there := p.err == nil && p.main == nil
	if there && len(p.rest) == 0 {
		in.settling = ""
		in.fight.calm(now)
		in.joined = p.target
		return in.underFire(outcome{installed: true}, p, marks)
	}
	// Another file than before, or fewer: what is there may be half of what
	// somebody is about to write.
	if other := in.joined != "" && p.target != in.joined; other || p.unsure || p.err != nil || p.main == nil {
		if rest := in.settle(p, now); rest > 0 {
			return outcome{again: rest, installed: there, err: in.unsettled(p)}
		}
	} else {
		in.settling = "" // what was half-written is whole
	}
	if p.main != nil && in.joined == p.target {
		if due := in.fight.undone(now); due.After(now) {
			return in.underFire(outcome{again: due.Sub(now)}, p, marks)
		}
	}
	if p.main != nil {
		if err := dir.apply(*p.main); err != nil {
			return in.unwritten(*p.main, err)
		}
		if out.result = ResultHealed; in.joined != p.target {
			in.opts.Log.Info("joined the CNI configuration", "file", dir.path(p.target), "of", p.of, "plugins", p.foreign)
		} else {
			in.opts.Log.Warn("the entry was gone from the CNI configuration, or changed, and is put back", "file", dir.path(p.target))
		}
		in.fight.wrote(now)
	}
	if p.err == nil {
		in.joined, out.installed = p.target, true
	}
	for _, e := range p.rest {
		if err := dir.apply(e); err != nil {
			failed := in.unwritten(e, err)
			failed.installed = out.installed
			return failed
		}
		in.opts.Log.Info("took the entry out of a file that is not the one to join", "file", dir.path(e.name), "joined", p.target)
	}
	if out.err = p.err; p.err != nil {
		out.result = ResultConf
		if errors.Is(p.err, ErrWaiting) {
			out.result = ResultWaiting
		}
		return out
	}
	return in.underFire(out, p, marks)
}

// settle says how long the plan has to stay the same yet.
func (in *Installer) settle(p plan, now time.Time) time.Duration {
	what := p.target + "\x00" + text(p.err)
	for _, e := range p.rest {
		what += "\x00" + e.name
	}
	for name, note := range p.notes {
		if p.unsure {
			what += "\x00" + name + note
		}
	}
	if in.settling != what {
		in.settling, in.since = what, now
	}
	return in.times.settle - now.Sub(in.since)
}

// unsettled is what is said meanwhile: what was so before.
func (in *Installer) unsettled(p plan) error {
	if s := in.State(); in.joined != "" || s.Err != nil {
		return s.Err
	}
	return p.err
}

func (in *Installer) unwritten(e edit, err error) outcome {
	if errors.Is(err, errChanged) {
		return outcome{again: in.times.gap, err: in.State().Err}
	}
	return outcome{result: ResultConf, err: fmt.Errorf("write the CNI configuration %s: %w", confDir(in.opts.ConfDir).path(e.name), err)}
}

// underFire adds that it is a fight, if it is one.
func (in *Installer) underFire(out outcome, p plan, marks []string) outcome {
	if !in.fight.on() {
		in.fighting = false
		return out
	}
	out.err = blame(p.target, p.foreign, marks)
	if !in.fighting || out.result == ResultHealed {
		out.result = ResultFight
	}
	if !in.fighting {
		in.opts.Log.Error("the CNI configuration is changed back again and again: pods may start without being redirected", "error", out.err)
	}
	in.fighting = true
	return out
}

// gone fails where a directory was removed under its mount.
func (in *Installer) gone() error {
	for _, dir := range []string{in.opts.ConfDir, in.opts.BinDir} {
		if st, err := os.Stat(dir); err == nil {
			if sys, ok := st.Sys().(*syscall.Stat_t); ok && sys.Nlink == 0 {
				return fmt.Errorf("%s: %w", dir, errGone)
			}
		}
	}
	return nil
}

// dirs are those that files of ours are made in.
func (o *Options) dirs() []string {
	dirs := []string{o.BinDir, o.ConfDir, o.RunDir}
	if o.Kubeconfig.Path != "" {
		dirs = append(dirs, filepath.Dir(o.Kubeconfig.Path))
	}
	slices.Sort(dirs)
	return slices.Compact(dirs)
}

// note logs what is the matter with a file, once.
func (in *Installer) note(name, what string) {
	if in.noted[name] != what {
		in.noted[name] = what
		in.opts.Log.Warn("CNI configuration: "+what, "file", filepath.Join(in.opts.ConfDir, name))
	}
}

// report makes the outcome known.
func (in *Installer) report(out outcome) {
	file := ""
	if in.joined != "" {
		file = filepath.Join(in.opts.ConfDir, in.joined)
	}
	before := in.State()
	in.set(State{Installed: out.installed, File: file, Err: out.err, Behind: out.back})
	if out.err == nil && out.installed && !in.done {
		in.done = true
		out.result = ResultInstalled
	}
	news := text(out.err) != text(before.Err)
	switch {
	case out.result == ResultWaiting && !news:
		return // once is enough
	case out.result == ResultWaiting:
		in.opts.Log.Warn("the plugin is not installed yet", "error", out.err)
	case out.err != nil && news && out.result != ResultFight && out.result != "":
		in.opts.Log.Error("the plugin is not installed as it should be", "result", out.result, "error", out.err)
	case out.err == nil && news:
		in.opts.Log.Info("the plugin is installed as it should be", "file", file)
	}
	if out.result != "" {
		in.opts.OnResult(out.result)
	}
}

// pause says how long nothing has to be done unless something happens, and how
// long not even then.
func (in *Installer) pause(out outcome, watched bool) (pause, gap time.Duration) {
	if out.back {
		// No event is this one's to answer, and none tells of the other's end.
		in.failures = 0
		return in.times.back, in.times.back
	}
	gap = in.times.gap
	pause = in.times.verify + rand.N(in.times.verify/4)
	if !watched {
		pause = min(pause, 5*in.times.retry)
	}
	failed := out.err != nil && !errors.Is(out.err, ErrWaiting) && !errors.Is(out.err, ErrFight) && out.again == 0
	switch {
	case failed:
		pause = backOff(in.failures, in.times.retry, in.times.retryMax)
		// Something may be mended by what happens, but not by all that happens.
		gap = min(in.times.retry, pause)
		in.failures++
	default:
		in.failures = 0
	}
	if out.again > 0 {
		pause = out.again
	}
	return pause, gap
}

// wait returns when it is time to look again. It says whether there is a next
// time.
func (in *Installer) wait(ctx context.Context, w *watch, pause, gap time.Duration) bool {
	start := time.Now()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	early := false
	soon := func() {
		if !early {
			early = true
			timer.Reset(min(max(0, gap-time.Since(start)), max(0, pause-time.Since(start))))
		}
	}
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case e := <-w.events():
			if w.counts(e) {
				soon()
			}
		case err := <-w.trouble(): // more has happened than the kernel could tell
			in.opts.Log.Debug("everything is looked at", "because", err)
			soon()
		}
	}
}
