// SPDX-License-Identifier: Apache-2.0

// Package scratch makes what a probe tries things in: file systems and network
// namespaces that have no name and end with the process, however that ends,
// and a cgroup, which has to be removed.
package scratch

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A Dir is a file system that is mounted nowhere.
type Dir struct{ fd int }

// Mount makes a file system of a type (bpf, tmpfs). It needs Linux 5.2 (commits
// 24dcb3d90a1f, 93766fbd2696).
func Mount(fstype string) (*Dir, error) {
	ctx, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a file system of type %s: %w", fstype, err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigSetString(ctx, "mode", "0700"); err != nil {
		return nil, fmt.Errorf("make a file system of type %s: set its mode: %w", fstype, err)
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return nil, fmt.Errorf("make a file system of type %s: %w", fstype, err)
	}
	fd, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("mount a file system of type %s: %w", fstype, err)
	}
	return &Dir{fd}, nil
}

// Path leads to the root of the file system, in this process only.
func (d *Dir) Path() string { return "/proc/self/fd/" + strconv.Itoa(d.fd) }

// Close lets go of it, and of all that is in it.
func (d *Dir) Close() { unix.Close(d.fd) }

// A Netns is a network namespace without a name.
type Netns struct{ fd int }

const threadNetns = "/proc/thread-self/ns/net"

// NewNetns makes a network namespace. Its lo is down.
func NewNetns() (*Netns, error) {
	n := &Netns{-1}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		var err error
		n.fd, err = unix.Open(threadNetns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// FD is its descriptor.
func (n *Netns) FD() int { return n.fd }

// Path leads to it, in this process only.
func (n *Netns) Path() string { return "/proc/self/fd/" + strconv.Itoa(n.fd) }

// Close lets go of it: it ends with what runs in it.
func (n *Netns) Close() {
	if n.fd >= 0 {
		unix.Close(n.fd)
	}
}

// Do runs fn on a thread inside the namespace.
func (n *Netns) Do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter a network namespace: %w", err)
		}
		return fn()
	})
}

// onThread runs fn, which may leave the thread in another network namespace.
func onThread(fn func() error) error {
	runtime.LockOSThread()
	own, err := unix.Open(threadNetns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer func() {
		// A thread that can't come back is left locked: it dies with its
		// goroutine rather than serve others from the wrong place.
		if unix.Setns(own, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		unix.Close(own)
	}()
	return fn()
}

// CgroupPrefix begins the names of cgroups that NewCgroup makes.
const CgroupPrefix = "shunt-probe-"

// A Cgroup is a cgroup below the root of the hierarchy.
type Cgroup struct {
	Path string
	Dir  *os.File
}

// NewCgroup makes a cgroup below mount, where cgroup2 is.
func NewCgroup(mount string) (*Cgroup, error) {
	random := make([]byte, 6)
	_, _ = rand.Read(random) // never fails, by its documentation
	return Cgroup{Path: mount}.Child(CgroupPrefix + strconv.Itoa(os.Getpid()) + "-" + hex.EncodeToString(random))
}

// Child makes a cgroup in it, which is to be removed before.
func (c Cgroup) Child(name string) (*Cgroup, error) {
	path := filepath.Join(c.Path, name)
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open a cgroup: %w", err), unix.Rmdir(path))
	}
	return &Cgroup{path, dir}, nil
}

// Remove removes the cgroup. Processes leave theirs a moment after they have
// been waited for: it gives them time, until ctx is done.
func (c *Cgroup) Remove(ctx context.Context) error {
	c.Dir.Close()
	for {
		err := unix.Rmdir(c.Path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return &fs.PathError{Op: "remove cgroup", Path: c.Path, Err: err}
		}
		select {
		case <-ctx.Done():
			return &fs.PathError{Op: "remove cgroup", Path: c.Path, Err: err}
		case <-time.After(2 * time.Millisecond):
		}
	}
}
