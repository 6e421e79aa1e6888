// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const threadNetns = "/proc/thread-self/ns/net"

// namespace is a network namespace of the test's own, kept by a bind mount.
type namespace struct {
	path   string
	file   *os.File
	nl     *netlink.Handle
	closed bool
}

// newNamespace makes a namespace with lo up, mounted at a file in a temporary
// directory of the test, and closes it when the test ends.
func newNamespace(t testing.TB) *namespace {
	t.Helper()
	return newNamespaceBy(t, func(path string) error {
		return onThread(func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("unshare network namespace: %w", err)
			}
			return bindNamespace(threadNetns, path)
		})
	})
}

// newNamespaceOfUsers is newNamespace, but that the namespace belongs to a user
// namespace of its own, whose id 0 is id base here.
func newNamespaceOfUsers(t testing.TB, base int) *namespace {
	t.Helper()
	return newNamespaceBy(t, func(path string) error {
		// After the ids' map, as runtimes make it: the kernel looks then who
		// owns the files in /proc/net.
		cmd := exec.Command("unshare", "--net", "sleep", "1000")
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: base, Size: 65536}}
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids,
			Credential: &syscall.Credential{Uid: 0, Gid: 0},
		}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("unshare user namespace: %w", err)
		}
		defer func() {
			_ = cmd.Process.Kill() // the mount keeps both namespaces
			_ = cmd.Wait()
		}()
		its := fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)
		own, err := os.Readlink(threadNetns)
		if err != nil {
			return fmt.Errorf("read own network namespace: %w", err)
		}
		Eventually(t, "a network namespace of other users", func() bool {
			link, err := os.Readlink(its)
			return err == nil && link != own
		})
		return bindNamespace(its, path)
	})
}

func bindNamespace(from, path string) error {
	if err := unix.Mount(from, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind network namespace to %s: %w", path, err)
	}
	return nil
}

// newNamespaceBy has unshare make a namespace and mount it at path.
func newNamespaceBy(t testing.TB, unshare func(path string) error) *namespace {
	t.Helper()
	n := &namespace{path: filepath.Join(t.TempDir(), "netns")}
	// A mount point, not an object: the file must exist before the mount.
	if err := os.WriteFile(n.path, nil, 0o444); err != nil {
		t.Fatalf("create mount point: %v", err)
	}
	err := unshare(n.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.close(); err != nil {
			t.Error(err)
		}
	})
	if n.file, err = os.Open(n.path); err != nil {
		t.Fatalf("open network namespace: %v", err)
	}
	if n.nl, err = netlink.NewHandleAt(netns.NsHandle(n.file.Fd()), unix.NETLINK_ROUTE); err != nil {
		t.Fatalf("open netlink in %s: %v", n.path, err)
	}
	lo, err := n.nl.LinkByName("lo")
	if err != nil {
		t.Fatalf("find lo: %v", err)
	}
	if err := n.nl.LinkSetUp(lo); err != nil {
		t.Fatalf("set lo up: %v", err)
	}
	return n
}

// close lets go of the namespace; the kernel removes it when the last process
// and socket in it are gone.
func (n *namespace) close() error {
	if n.closed {
		return nil
	}
	n.closed = true
	var errs []error
	if n.nl != nil {
		n.nl.Close()
	}
	if n.file != nil {
		errs = append(errs, n.file.Close())
	}
	if err := unix.Unmount(n.path, unix.MNT_DETACH); err != nil {
		errs = append(errs, fmt.Errorf("unmount %s: %w", n.path, err))
	}
	errs = append(errs, os.Remove(n.path))
	return errors.Join(errs...)
}

// do runs f on a thread that is in the namespace.
func (n *namespace) do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %s: %w", n.path, err)
		}
		return f()
	})
}

// onThread runs f on a thread of its own, which f may move to another network
// namespace. The thread is moved back, and is destroyed if that fails.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open(threadNetns)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		defer home.Close()
		err = f()
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
			// Still locked: the thread ends with the goroutine.
			err = errors.Join(err, fmt.Errorf("return to own network namespace: %w", back))
		} else {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// sysctl writes a value below /proc/sys in the namespace. key is written with
// slashes or dots ("net.ipv4.tcp_fastopen").
func (n *namespace) sysctl(key, value string) error {
	if !strings.Contains(key, "/") {
		key = strings.ReplaceAll(key, ".", "/")
	}
	return n.do(func() error {
		return os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0o644)
	})
}

// cookie reads the namespace's cookie, which needs Linux 5.14 or later.
func (n *namespace) cookie() (uint64, error) {
	var cookie uint64
	err := n.do(func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	})
	return cookie, err
}

// ipv6Available says whether the running kernel has IPv6 at all.
func ipv6Available() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}
