// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/kubeapi"
)

// A claim says whose the node is: of two agents, as an upgrade may have them for
// as long as the new one is not ready, the one that was started later. Without it
// each would take the other's binaries and kubeconfig for damage, for ever.
//
// It holds as long as its process has the file locked, which the kernel sees to:
// one that was killed leaves the node to the other. It is made and looked at under
// the node's lock.
type claim struct {
	Agent string    `json:"agent"` // its DaemonSet
	Host  string    `json:"host"`  // its pod, which has its name for a host name
	Since time.Time `json:"since"`
	// Start is when the process was started, in ns since the node's boot. An
	// agent that installs anew, by another netconf, is no later for that.
	Start int64 `json:"start"`
}

func (c *claim) String() string {
	return fmt.Sprintf("another agent (%s, %s) has this node since %s", c.Agent, c.Host, c.Since.UTC().Format(time.RFC3339))
}

// processStart is that of this process. The kernel's clock since the boot is the
// same for all containers, and nobody sets it.
var processStart = func() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return ts.Nano()
}()

// claim has the node be this agent's, or says which later one has it.
func (in *Installer) claim() (other *claim, err error) {
	path := filepath.Join(in.opts.RunDir, claimFile)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, in.take(path)
	}
	if err != nil {
		return nil, explain(err)
	}
	defer f.Close()
	if mine, err := in.holds(f); err != nil || mine {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	switch {
	case err == nil: // whose it was is gone
		return nil, in.take(path)
	case !errors.Is(err, unix.EWOULDBLOCK):
		return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxConf))
	if err != nil {
		return nil, err
	}
	// What can't be read is nobody's that is later: it was never written like this.
	if other = new(claim); json.Unmarshal(data, other) != nil || other.Start < in.start {
		return nil, in.take(path)
	}
	in.release()
	return other, nil
}

// holds says whether the claim is this installer's.
func (in *Installer) holds(f *os.File) (bool, error) {
	if in.held == nil {
		return false, nil
	}
	is, err := f.Stat()
	if err != nil {
		return false, err
	}
	mine, err := in.held.Stat()
	return err == nil && os.SameFile(is, mine), err
}

// take makes the claim: locked before it has its name, so that nobody ever sees
// one that looks as if its agent had died.
func (in *Installer) take(path string) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	data, err := json.Marshal(claim{Agent: in.opts.Agent.String(), Host: host, Since: time.Now(), Start: in.start})
	if err != nil {
		return err
	}
	temp, err := writeTemp(filepath.Dir(path), bytes.NewReader(append(data, '\n')), own(0o600))
	if err != nil {
		return err
	}
	f, err := os.OpenFile(temp, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		_ = os.Remove(temp)
		return explain(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		_ = os.Remove(temp)
		return &fs.PathError{Op: "lock", Path: temp, Err: err}
	}
	if err := replaceBy(temp, path); err != nil {
		f.Close()
		return err
	}
	in.release()
	in.held = f
	// What was done to the entry meanwhile was another agent's doing, and no fight.
	in.fight, in.fighting, in.settling = fight{times: in.fight.times}, false, ""
	return nil
}

// release gives the node up, for an agent that was started earlier to have it.
func (in *Installer) release() {
	if in.held != nil {
		in.held.Close()
		in.held = nil
	}
}

// standBack leaves everything to a later agent. All is well as long as there is
// a plugin that works, be it this one's or not.
func (in *Installer) standBack(other *claim) outcome {
	if what := other.String(); in.behind != what {
		in.behind = what
		in.opts.Log.Info(what + ": this one changes nothing while that one runs")
	}
	file, links, err := in.verify()
	in.joined = file
	out := outcome{installed: err == nil, back: true, links: links}
	if err != nil {
		out.result = ResultWaiting
		out.err = fmt.Errorf("%s, and not all is in its place: %w: look at its log, or delete its pod", other, err)
	}
	return out
}

// verify finds the file that has an entry, whoever made it, and fails unless what
// the entry needs is there.
func (in *Installer) verify() (file string, links []string, err error) {
	files, links, _, err := confDir(in.opts.ConfDir).read()
	if err != nil {
		return "", nil, fmt.Errorf("read the CNI configuration: %w", err)
	}
	for i := range files {
		if f := &files[i]; len(leave(files[i:i+1], "")) > 0 || !in.opts.Chained && f.name == in.opts.ConfFile && onlyOurs(f) {
			file = f.name
			break
		}
	}
	if file == "" {
		return "", links, errors.New("no CNI configuration has the entry")
	}
	for _, name := range binaries {
		path := filepath.Join(in.opts.BinDir, name)
		st, err := os.Stat(path)
		if err != nil {
			return file, links, err
		}
		if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
			return file, links, fmt.Errorf("%s is not an executable file", path)
		}
	}
	if path := in.opts.Kubeconfig.Path; path != "" {
		if err := kubeapi.CheckConfig(path); err != nil {
			return file, links, err
		}
	}
	return file, links, nil
}
