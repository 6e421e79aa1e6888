// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/rundir"
)

// A Mode is which of the kernel's two packet filters the programs speak to.
type Mode string

// The modes. Auto, of options only, leaves the choice to what the node has.
const (
	Auto   Mode = "auto"
	NFT    Mode = "nft"
	Legacy Mode = "legacy"
)

func (m Mode) other() Mode {
	if m == NFT {
		return Legacy
	}
	return NFT
}

const (
	// DefaultPath is where the programs are looked for if nothing is said.
	DefaultPath = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin"
	// defaultTimeout is how long a program may take.
	defaultTimeout = 10 * time.Second

	maxStderr = 600 // of what goes into an error
	maxStdout = 32 << 20
	tooMuch   = 1 << 20 // bytes more than that: it is cut off

	install = "install the package iptables, 1.8 or later, on the node"
)

var errTooMuch = errors.New("it says too much")

// ErrNotInstalled says that the node has no iptables programs that would do.
var ErrNotInstalled = errors.New("no iptables programs are installed")

// tools are the programs of a mode, by their paths.
type tools struct {
	Mode               Mode
	Restore4, Restore6 string
	Save4, Save6       string
}

func (t *tools) restore(f Family) string {
	if f == IPv6 {
		return t.Restore6
	}
	return t.Restore4
}

func (t *tools) save(f Family) string {
	if f == IPv6 {
		return t.Save6
	}
	return t.Save4
}

// lookPath finds a program in the folders of path.
func lookPath(path, name string) (string, error) {
	for _, dir := range filepath.SplitList(path) {
		if !filepath.IsAbs(dir) {
			continue
		}
		file := filepath.Join(dir, name)
		if st, err := os.Stat(file); err == nil && st.Mode().IsRegular() && unix.Access(file, unix.X_OK) == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s is not in %s: %w", name, path, ErrNotInstalled)
}

// find looks for the programs whose names have an infix: "-nft", "-legacy", or
// none for those that the node prefers. Their mode is not set.
func (b *Backend) find(infix string) (*tools, error) {
	t := new(tools)
	for _, x := range []struct {
		path *string
		name string
	}{
		{&t.Restore4, "iptables" + infix + "-restore"},
		{&t.Restore6, "ip6tables" + infix + "-restore"},
		{&t.Save4, "iptables" + infix + "-save"},
		{&t.Save6, "ip6tables" + infix + "-save"},
	} {
		var err error
		if *x.path, err = lookPath(b.opts.Path, x.name); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// choice is a finding of detect, kept in RunDir for as long as the programs
// are the same files.
type choice struct {
	Asked Mode
	Path  string
	Tools tools
	Files []stamp
}

type stamp struct {
	Dev, Ino uint64
	Size     int64
	Mtime    int64 // ns
}

func stamps(t *tools) (out []stamp) {
	for _, path := range []string{t.Restore4, t.Restore6, t.Save4, t.Save6} {
		var st unix.Stat_t
		_ = unix.Stat(path, &st) // the zero stamp is that of no file
		out = append(out, stamp{st.Dev, st.Ino, st.Size, st.Mtim.Nano()})
	}
	return out
}

func (b *Backend) choicePath() string { return filepath.Join(b.opts.RunDir, "iptables-backend") }

// tools gives the node's programs: those that were found to work before, or
// those that are now.
func (b *Backend) tools(ctx context.Context) (*tools, error) {
	if b.found != nil {
		return b.found, nil
	}
	// What is read there names programs that are run as root.
	if err := rundir.Check(b.opts.RunDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("runDir: %w", err)
	}
	if data, err := os.ReadFile(b.choicePath()); err == nil {
		var c choice
		if json.Unmarshal(data, &c) == nil && c.Asked == b.opts.Mode && c.Path == b.opts.Path {
			now := stamps(&c.Tools)
			same := len(now) == len(c.Files)
			for i := range now {
				same = same && now[i] == c.Files[i] && now[i] != stamp{}
			}
			if same {
				b.found = &c.Tools
				return b.found, nil
			}
		}
	}
	t, err := b.detect(ctx)
	if err != nil {
		return nil, err
	}
	b.found = t
	data, err := json.Marshal(choice{Asked: b.opts.Mode, Path: b.opts.Path, Tools: *t, Files: stamps(t)})
	if err == nil {
		err = errors.Join(os.MkdirAll(b.opts.RunDir, 0o700), b.keepChoice(data))
	}
	if err != nil {
		b.opts.Log.Warn("the iptables mode could not be kept; the next pod finds it anew", "error", err)
	}
	return t, nil
}

// keepChoice writes down what was found. Where another process is about to write
// the same, it may.
func (b *Backend) keepChoice(data []byte) error {
	next := b.choicePath() + ".next"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "lock", Path: next, Err: err}
	}
	mine, err := f.Stat()
	if err != nil {
		return err
	}
	if now, err := os.Lstat(next); err != nil || !os.SameFile(mine, now) {
		return nil //nolint:nilerr // another had the lock until just now, and it is written
	}
	return replace(b.choicePath(), next, data)
}

// detect finds programs that work on this node: of those that the node prefers,
// of nft and of legacy the first that does what a pod needs, in a namespace
// that ends with the attempt.
func (b *Backend) detect(ctx context.Context) (*tools, error) {
	var (
		errs  []error
		tried = map[Mode]bool{}
	)
	infixes := []string{"", "-nft", "-legacy"}
	if b.opts.Mode != Auto {
		infixes = []string{"-" + string(b.opts.Mode), ""}
	}
	for _, infix := range infixes {
		t, err := b.find(infix)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if t.Mode = Mode(strings.TrimPrefix(infix, "-")); infix == "" {
			if t.Mode, err = b.modeOf(ctx, t.Restore4); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		if b.opts.Mode != Auto && t.Mode != b.opts.Mode || tried[t.Mode] {
			continue
		}
		tried[t.Mode] = true
		if err := b.try(ctx, t); err != nil {
			errs = append(errs, fmt.Errorf("%s does not work here: %w", t.Restore4, err))
			continue
		}
		return t, nil
	}
	what := "iptables programs"
	if b.opts.Mode != Auto {
		what += " of mode " + string(b.opts.Mode)
	}
	if len(errs) == 0 {
		errs = append(errs, ErrNotInstalled)
	}
	err := errors.Join(errs...)
	if errors.Is(err, ErrNotInstalled) && len(tried) == 0 {
		return nil, fmt.Errorf("find %s: %w (%s)", what, oneLine(err), install)
	}
	return nil, fmt.Errorf("find %s: %w", what, oneLine(err))
}

// joined is an error of several, on one line.
type joined struct{ error }

func oneLine(err error) error { return joined{err} }

func (j joined) Error() string { return strings.ReplaceAll(j.error.Error(), "\n", "; ") }
func (j joined) Unwrap() error { return j.error }

// modeOf tells the mode of programs whose name doesn't: by the file that they
// are links to, else by asking them.
func (b *Backend) modeOf(ctx context.Context, path string) (Mode, error) {
	if file, err := filepath.EvalSymlinks(path); err == nil {
		switch filepath.Base(file) {
		case "xtables-nft-multi":
			return NFT, nil
		case "xtables-legacy-multi":
			return Legacy, nil
		}
	}
	out, err := b.run(ctx, nil, "", path, "--version")
	if err != nil {
		return "", err
	}
	// "iptables-restore v1.8.9 (nf_tables)"; before 1.8 there was one mode and
	// no brackets.
	if _, in, _ := strings.Cut(out, "("); strings.HasPrefix(in, "nf_tables") {
		return NFT, nil
	}
	return Legacy, nil
}

// try has the programs do, in a new namespace, what every pod needs.
func (b *Backend) try(ctx context.Context, t *tools) error {
	n, err := scratchNamespace()
	if err != nil {
		return fmt.Errorf("make a scratch network namespace: %w", err)
	}
	defer n.close()
	const probe = prefix + "PROBE"
	_, err = b.run(ctx, n, "*nat\n-N "+probe+"\n-A "+probe+" -p tcp -m owner ! --uid-owner 1337 -j REDIRECT --to-ports 15001\nCOMMIT\n", t.Restore4, "--noflush")
	return err
}

// scratchNamespace makes a namespace that ends when it is closed.
func scratchNamespace() (*namespace, error) {
	n := &namespace{fd: -1, path: "scratch", users: -1}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		fd, err := unix.Open(threadNetns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		n.fd = fd
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		n.inode = st.Ino
		return err
	})
	if err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

// bounded keeps the first bytes that are written to it. A program that goes on
// and on gets SIGPIPE in the end.
type bounded struct {
	kept bytes.Buffer
	max  int
	all  int
}

func (b *bounded) Write(p []byte) (int, error) {
	b.kept.Write(p[:min(len(p), b.max-b.kept.Len())])
	if b.all += len(p); b.all > b.max+tooMuch {
		return 0, errTooMuch
	}
	return len(p), nil
}

// run runs a program to its end, in a network namespace and in the user
// namespace that owns that. What it says on stderr is in the error. A program
// that does not end in time is killed, with all of its process group.
func (b *Backend) run(ctx context.Context, n *namespace, stdin string, argv ...string) (string, error) {
	name := filepath.Base(argv[0])
	// A file rather than a pipe: nobody has to stand by and fill it. It is
	// also the lock that legacy programs want: the host's is for the host's
	// rules, and what would change this pod's at the same time waits for ours.
	fd, err := unix.MemfdCreate("shunt-"+name, unix.MFD_CLOEXEC)
	if err != nil {
		return "", fmt.Errorf("%s: keep its input: %w", name, err)
	}
	in := os.NewFile(uintptr(fd), "input")
	defer in.Close()
	if _, err := in.WriteString(stdin); err != nil {
		return "", fmt.Errorf("%s: keep its input: %w", name, err)
	}
	if _, err := in.Seek(0, 0); err != nil {
		return "", fmt.Errorf("%s: keep its input: %w", name, err)
	}

	var extra []*os.File
	inherit := func(fd int) error {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err == nil {
			extra = append(extra, os.NewFile(uintptr(dup), "inherited"))
		}
		return err
	}
	defer func() {
		for _, f := range extra {
			f.Close()
		}
	}()
	if n != nil && n.users >= 0 {
		nsenter, err := lookPath(b.opts.Path, "nsenter")
		if err != nil {
			return "", fmt.Errorf("enter the pod's user namespace: %w (install the package util-linux on the node)", err)
		}
		if err := inherit(n.users); err != nil { // as descriptor 3
			return "", err
		}
		argv = append([]string{nsenter, "-U/proc/self/fd/3", "--"}, argv...)
	}
	if b.held >= 0 {
		if err := inherit(b.held); err != nil {
			return "", err
		}
	}

	limited, cancel := context.WithTimeout(ctx, b.opts.Timeout)
	defer cancel()
	stdout, stderr := &bounded{max: maxStdout}, &bounded{max: maxStderr}
	cmd := exec.CommandContext(limited, argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = in, stdout, stderr, extra
	cmd.Env = []string{"PATH=" + DefaultPath, "LC_ALL=C", "XTABLES_LOCKFILE=/proc/self/fd/0"}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	b.children.Add(1)
	start := cmd.Start
	if n != nil {
		start = func() error { return n.do(cmd.Start) }
	}
	err = start()
	if err == nil {
		err = cmd.Wait()
	}
	switch {
	case err == nil:
		return stdout.kept.String(), nil
	case limited.Err() != nil && ctx.Err() == nil:
		err = fmt.Errorf("did not end within %v and was killed", b.opts.Timeout)
	case ctx.Err() != nil:
		err = fmt.Errorf("was killed: %w", context.Cause(ctx))
	}
	if said := strings.Join(strings.Fields(stderr.kept.String()), " "); said != "" {
		return "", fmt.Errorf("%s: %w: %s", name, err, said)
	}
	var notFound *fs.PathError
	if errors.As(err, &notFound) {
		return "", fmt.Errorf("%s: %w (%s)", name, err, install)
	}
	return "", fmt.Errorf("%s: %w", name, err)
}
