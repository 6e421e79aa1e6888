// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// steppedEnv makes the test binary walk its steps in the directory it names.
const steppedEnv = "SHUNT_TESTBED_STEPPED"

func init() {
	if dir := os.Getenv(steppedEnv); dir != "" {
		if err := stepped(dir); err != nil {
			fmt.Fprintln(os.Stderr, errnoName(err))
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// stepped changes something at each of its steps, on threads of their own.
func stepped(dir string) error {
	sub := filepath.Join(dir, "sub")
	for _, step := range []func() error{
		func() error { return os.Mkdir(sub, 0o700) },
		func() error { return os.WriteFile(filepath.Join(sub, "new"), []byte("x"), 0o600) },
		func() error { return os.Rename(filepath.Join(sub, "new"), filepath.Join(sub, "file")) },
		func() error {
			return withSocket(unix.AF_NETLINK, unix.SOCK_RAW, func(s int) error {
				return unix.Sendto(s, make([]byte, unix.SizeofNlMsghdr), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
			})
		},
		func() error {
			return withSocket(unix.AF_NETLINK, unix.SOCK_RAW, func(s int) error {
				_, err := unix.Write(s, make([]byte, unix.SizeofNlMsghdr))
				return err
			})
		},
		func() error { // which is no step: nobody else's
			return withSocket(unix.AF_UNIX, unix.SOCK_DGRAM, func(s int) error {
				if _, err := unix.Write(s, []byte("x")); !errors.Is(err, unix.ENOTCONN) {
					return fmt.Errorf("write to a socket without a peer: %w", err)
				}
				return nil
			})
		},
		func() error { return unix.Unlink(filepath.Join(sub, "file")) },
	} {
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // for good: the thread ends with the goroutine
			done <- step()
		}()
		if err := <-done; err != nil {
			return err
		}
	}
	_, err := fmt.Println("done")
	return err
}

// withSocket has fn use a socket.
func withSocket(family, typ int, fn func(s int) error) error {
	s, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	return fn(s)
}

func runStepped(t *testing.T, fault Fault, observe ...string) (r StepsResult, dir string) {
	t.Helper()
	dir = t.TempDir()
	r, err := RunSteps(StepsSpec{
		Argv: []string{"/proc/self/exe"}, Env: append(goEnv(), "GORACE=atexit_sleep_ms=0", steppedEnv+"="+dir), Fault: fault, Observe: observe,
	})
	if err != nil {
		t.Fatal(err)
	}
	return r, dir
}

func TestSteps(t *testing.T) {
	NeedSteps(t)
	NoLeaks(t)
	r, dir := runStepped(t, Fault{})
	var got []string
	for _, s := range r.Steps {
		got = append(got, s.String())
	}
	sub := dir + "/sub"
	want := []string{
		"mkdirat(" + sub + ")", "openat(" + sub + "/new)", "write(" + sub + "/new)",
		"renameat(" + sub + "/new, " + sub + "/file)", "sendto(netlink)", "write(netlink)", "unlinkat(" + sub + "/file)",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("steps (-want +got):\n%s", diff)
	}
	if r.Hit || r.ExitCode != 0 || string(r.Stdout) != "done\n" || len(r.Stderr) != 0 {
		t.Errorf("%+v", r)
	}
	for i, s := range r.Steps {
		fault := Fault{Step: i + 1, Kind: FailCall, Errno: unix.ENOSPC}
		r, _ := runStepped(t, fault)
		if !r.Hit || r.ExitCode != 1 || string(r.Stderr) != "ENOSPC\n" || len(r.Steps) != i+1 || r.Steps[i].Err != unix.ENOSPC {
			t.Errorf("%v, %v: %+v", s, fault, r)
		}
		for _, kind := range []FaultKind{KillBefore, KillAfter} {
			fault := Fault{Step: i + 1, Kind: kind}
			r, _ := runStepped(t, fault)
			if !r.Hit || r.ExitCode != -1 || len(r.Steps) != i+1 || r.Steps[i].Done {
				t.Errorf("%v, %v: %+v", s, fault, r)
			}
		}
	}

	// What was to happen has happened, and no more.
	for _, c := range []struct {
		fault     Fault
		old, file bool
	}{
		{Fault{Step: 4, Kind: KillBefore}, true, false},
		{Fault{Step: 4, Kind: KillAfter}, false, true},
		{Fault{Step: 4, Kind: FailCall, Errno: unix.EIO}, true, false},
		{Fault{Step: 7, Kind: KillBefore}, false, true},
		{Fault{Step: 7, Kind: KillAfter}, false, false},
		{Fault{Step: 8}, false, false},
	} {
		r, dir := runStepped(t, c.fault)
		if old, file := exists(t, dir+"/sub/new"), exists(t, dir+"/sub/file"); old != c.old || file != c.file || r.Hit != (c.fault.Step < 8) {
			t.Errorf("%v: new %v, file %v; want %v, %v", c.fault, old, file, c.old, c.file)
		}
	}

	r, _ = runStepped(t, Fault{}, "openat", "socket")
	if len(r.Steps) <= len(want)+1 {
		t.Errorf("observed: %v", r.Steps)
	}
	r, err := RunSteps(StepsSpec{Argv: []string{"/bin/sleep", "1000"}, Timeout: 100 * time.Millisecond})
	if err != nil || !r.TimedOut || r.ExitCode != -1 {
		t.Errorf("a program that hangs: %+v, %v", r, err)
	}
	if _, err := RunSteps(StepsSpec{Argv: []string{"/none/such"}}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a program that is not there: %v", err)
	}
}

func exists(t *testing.T, path string) bool {
	t.Helper()
	_, err := os.Lstat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}
