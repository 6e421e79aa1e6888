// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/rundir"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	records "shunt.dev/shunt/redirect/iptables/record"
)

// A record is what is known of one attachment: written before anything is
// changed for it, removed after everything has been undone.
type record struct {
	redirect.Attachment
	// Network is the CNI network's name.
	Network string
	Pod     redirect.PodRef

	// The network namespace. Its inode may be another's after its end, its
	// cookie can't; 0 where the kernel has none. Boot is the boot's id.
	Netns  string
	Inode  uint64
	Cookie uint64
	Boot   string

	Mode   Mode
	TProxy bool // the routing rule and its table were made
	S6     bool // ::6 was put on lo
	// Sysctls are those that were changed, with what they were before.
	Sysctls map[string]string
	// IPv4 and IPv6 are the rules as they were applied; empty for a family
	// that the pod does not have.
	IPv4, IPv6 string
	// Kept: another backend redirects the pod by now, and of the rules is left what
	// the connections need that these have redirected.
	Kept bool `json:",omitempty"`
	// Done: Apply came to its end. Until then any part may be missing.
	Done bool
}

func (r *record) families() (out []Family) {
	for _, f := range []Family{IPv4, IPv6} {
		if r.rules(f) != "" {
			out = append(out, f)
		}
	}
	return out
}

func (r *record) rules(f Family) string {
	if f == IPv6 {
		return r.IPv6
	}
	return r.IPv4
}

// of says whether a namespace is the record's.
func (r *record) of(n *namespace) bool {
	return r.in(n.inode, n.cookie, loader.BootID())
}

// in says whether a namespace of that inode and cookie is the record's. A boot that
// can't be told, or could not be when the record was made, is taken for the same.
func (r *record) in(inode, cookie uint64, boot string) bool {
	return r.Inode == inode && r.Cookie == cookie && (r.Boot == boot || r.Boot == "" || boot == "")
}

// open opens the network namespace. Where the record's path was a process's, and
// that has ended, another process may still be there.
func (r *record) open() (*namespace, error) {
	n, err := openNamespace(r.Netns)
	if !errors.Is(err, fs.ErrNotExist) || !strings.HasPrefix(r.Netns, "/proc/") {
		return n, err
	}
	others, err2 := filepath.Glob("/proc/[0-9]*/ns/net")
	if err2 != nil {
		return nil, err2
	}
	for _, path := range others {
		if link, err := os.Readlink(path); err != nil || link != fmt.Sprintf("net:[%d]", r.Inode) {
			continue
		}
		if n, err := openNamespace(path); err == nil {
			return n, nil
		}
	}
	return nil, err
}

// dir is the folder that holds the records and their lock.
func (b *Backend) dir() string { return records.Dir(b.opts.RunDir) }

func (b *Backend) recordPath(a redirect.Attachment) string { return records.Path(b.opts.RunDir, a) }

// readRecord returns nil without error when there is none.
func readRecord(path string) (*record, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the attachment's record: %w", err)
	}
	r := new(record)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("parse the attachment's record %s: %w", path, err)
	}
	return r, nil
}

func (b *Backend) nextPath(a redirect.Attachment) string { return records.NextPath(b.opts.RunDir, a) }

func (b *Backend) writeRecord(r *record) error {
	data, err := json.Marshal(r)
	if err == nil {
		err = replace(b.recordPath(r.Attachment), b.nextPath(r.Attachment), data)
	}
	if err != nil {
		return fmt.Errorf("write the attachment's record: %w", err)
	}
	return nil
}

// replace puts data in the place of a file, whole or not at all whenever this
// process ends. Nothing is synced: it means nothing after the next boot. next is
// the name that the file has meanwhile, and a lock keeps others from it.
func replace(path, next string, data []byte) error {
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		_ = os.Remove(next)
	}
	return err
}

// removeRecord removes a record, and what a killed process has left of a newer
// one.
func (b *Backend) removeRecord(r *record) error {
	for _, path := range []string{b.nextPath(r.Attachment), b.recordPath(r.Attachment)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the attachment's record: %w", err)
		}
	}
	return nil
}

// records lists all there are; those that can't be read are in the error.
func (b *Backend) records() ([]*record, error) {
	entries, err := os.ReadDir(b.dir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	var (
		out  []*record
		errs []error
	)
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		r, err := readRecord(filepath.Join(b.dir(), e.Name()))
		if err != nil {
			errs = append(errs, err)
		} else if r != nil {
			out = append(out, r)
		}
	}
	return out, errors.Join(errs...)
}

// shared says whether another attachment has the same namespace: the rules are
// the namespace's, and stay until the last one goes.
func (b *Backend) shared(r *record) (bool, error) {
	paths, err := filepath.Glob(filepath.Join(b.dir(), r.ContainerID+"@*.json"))
	if err != nil {
		return false, err
	}
	for _, path := range paths {
		if path == b.recordPath(r.Attachment) {
			continue
		}
		other, err := readRecord(path)
		if err != nil {
			return false, err
		}
		if other != nil && other.in(r.Inode, r.Cookie, r.Boot) {
			return true, nil
		}
	}
	return false, nil
}

// lock keeps others from the attachments of a container. Other containers'
// are not held up. The kernel releases it when the process has ended, however
// it has, and the programs that it had started: they hold the lock too. It
// waits until ctx is done.
func (b *Backend) lock(ctx context.Context, a redirect.Attachment) (func(), error) {
	for _, dir := range []string{b.opts.RunDir, b.dir()} {
		if err := rundir.Make(dir); err != nil {
			return nil, fmt.Errorf("make the folder of records: %w", err)
		}
	}
	path := filepath.Join(b.dir(), "lock")
	f, err := unix.Open(path, unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	release := func() {
		b.held = -1
		unix.Close(f)
	}
	set := func(cmd int) error {
		for {
			err := unix.FcntlFlock(uintptr(f), cmd, &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: lockPlace(a), Len: 1})
			if !errors.Is(err, syscall.EINTR) {
				return err
			}
		}
	}
	err = set(unix.F_OFD_SETLK)
	if err == nil {
		b.held = f
		return release, nil
	}
	if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
		release()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	done := make(chan error, 1)
	go func() { done <- set(unix.F_OFD_SETLKW) }()
	select {
	case err = <-done:
		if err != nil {
			release()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		b.held = f
		return release, nil
	case <-ctx.Done():
		go func() {
			<-done //nolint:errcheck // nobody waits for it any more
			unix.Close(f)
		}()
		return nil, fmt.Errorf("wait for %s, held by another shunt process: %w", path, context.Cause(ctx))
	}
}

// lockPlace is the byte of the lock's file that stands for a container. That two
// may have the same does no harm.
func lockPlace(a redirect.Attachment) int64 {
	h := fnv.New32a()
	_, _ = io.WriteString(h, a.ContainerID)
	return int64(h.Sum32())
}
