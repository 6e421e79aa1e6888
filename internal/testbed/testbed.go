// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package testbed is the bed that privileged tests lie on: pods and the world
// around them as network namespaces, pod cgroups, processes inside a pod under
// a test's control (actors), a private bpffs, and the plugin run as the
// container runtime runs it.
//
// A package that uses it has
//
//	func TestMain(m *testing.M) { testbed.Main(m) }
//
// and starts each privileged test with [Privileged], then [NoLeaks]. Nothing
// outside of what a test made is touched: no link, address or rule is put in
// the host's network namespace.
//
// The bed's methods end the test (t.Fatal) when the bed itself is at fault.
// What the kernel answers to the system calls under test is data: results
// carry errno names, such as "ECONNREFUSED", and "" for success.
package testbed

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// SkipPrefix begins the reason of every skip for want of privilege, so that CI
// can tell such skips from others.
const SkipPrefix = "SKIP-PRIVILEGED:"

// deadline is how long the bed waits for something that should be there at
// once. It is generous because machines under emulation are slow.
const deadline = 20 * time.Second

// Require fails the test unless it runs as root in the initial namespaces'
// sense: effective uid 0 with CAP_SYS_ADMIN and CAP_NET_ADMIN.
func Require(t testing.TB) {
	t.Helper()
	if why := unprivileged(); why != "" {
		t.Fatalf("this test needs root: %s", why)
	}
}

// Privileged skips the test, with a reason that starts with [SkipPrefix],
// unless it runs as root.
func Privileged(t testing.TB) {
	t.Helper()
	if why := unprivileged(); why != "" {
		t.Skipf("%s %s; run the tests as root", SkipPrefix, why)
	}
}

// unprivileged says what is missing, or "".
func unprivileged() string {
	if uid := os.Geteuid(); uid != 0 {
		return fmt.Sprintf("effective uid is %d, not 0", uid)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Sprintf("capabilities can't be read: %v", err)
	}
	for _, c := range []struct {
		name string
		bit  uint
	}{{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN}, {"CAP_NET_ADMIN", unix.CAP_NET_ADMIN}} {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			return c.name + " is missing"
		}
	}
	return ""
}

var process struct {
	mu   sync.Mutex
	main bool   // Main runs, and will clean up
	dir  string // the process's own temporary directory, once asked for
}

// Main runs the tests and ends the process. It belongs in TestMain: it removes
// what is made once a process, and turns the outcome into a failure when the
// process leaves mounts or cgroups of its own behind.
func Main(m *testing.M) {
	process.mu.Lock()
	process.main = true
	process.mu.Unlock()

	code := m.Run()

	process.mu.Lock()
	dir := process.dir
	process.mu.Unlock()
	if dir != "" {
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintf(os.Stderr, "testbed: remove %s: %v\n", dir, err)
			code = max(code, 1)
		}
	}
	if left := ownLeftovers(); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "testbed: left behind by this process:\n\t%s\n", strings.Join(left, "\n\t"))
		code = max(code, 1)
	}
	os.Exit(code)
}

// processDir is a directory that lives until Main ends.
func processDir() (string, error) {
	process.mu.Lock()
	defer process.mu.Unlock()
	if !process.main {
		return "", errors.New("TestMain must call testbed.Main")
	}
	if process.dir == "" {
		dir, err := os.MkdirTemp("", "shunt-testbed-")
		if err != nil {
			return "", err
		}
		process.dir = dir
	}
	return process.dir, nil
}

// cgroupPrefix begins the name of every cgroup tree made by this process.
func cgroupPrefix() string { return fmt.Sprintf("shunt-test-%d-", os.Getpid()) }

// ownLeftovers lists cgroups and child processes of this process that the
// tests' clean-up has missed.
func ownLeftovers() []string {
	var left []string
	if root, err := cgroup2Mount(); err == nil {
		dirs, _ := filepath.Glob(filepath.Join(root, cgroupPrefix()+"*"))
		left = append(left, dirs...)
	}
	for _, c := range children() {
		left = append(left, "process "+c)
	}
	return left
}

// randomHex gives n random bytes in hexadecimal.
func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails, by its documentation
	return hex.EncodeToString(b)
}

// randomUID gives a UID as the API server makes them: a version 4 UUID.
func randomUID() string {
	h := []byte(randomHex(16))
	h[12], h[16] = '4', '8'
	return fmt.Sprintf("%s-%s-%s-%s-%s", h[:8], h[8:12], h[12:16], h[16:20], h[20:])
}

// Poll asks cond until it says true or within has passed, and reports which.
// The pause between two questions grows from 100 µs to 10 ms.
func Poll(within time.Duration, cond func() bool) bool {
	end := time.Now().Add(within)
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 10*time.Millisecond) {
		if cond() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
		time.Sleep(pause)
	}
}

// Eventually fails the test if cond does not become true within the bed's
// deadline of 20 s. what completes the sentence "waited in vain for …".
func Eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	if !Poll(deadline, cond) {
		t.Fatalf("waited in vain for %s", what)
	}
}
