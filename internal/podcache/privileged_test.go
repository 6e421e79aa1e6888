// SPDX-License-Identifier: Apache-2.0

//go:build linux

package podcache

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"shunt.dev/shunt/internal/podfacts"
	"shunt.dev/shunt/internal/testbed"
)

// asStranger makes the test binary ask, or listen, as whoever it is.
const asStranger = "SHUNT_PODCACHE_TEST_AS"

func init() {
	runDir := os.Getenv(asStranger)
	if runDir == "" {
		return
	}
	if os.Getenv("LISTEN") != "" {
		if _, err := net.Listen("unix", SocketPath(runDir)); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("listening")
		select {}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	pod, err := podfacts.NewAgent(runDir).Pod(ctx, "ns", "a", "1")
	fmt.Printf("%v %v\n", pod, err)
	os.Exit(0)
}

// stranger returns a command that runs this test binary as nobody, who may do
// nothing that other users may not.
func stranger(t *testing.T, runDir string, env ...string) *exec.Cmd {
	t.Helper()
	// Where everybody can execute it.
	program := filepath.Join(filepath.Dir(runDir), "stranger")
	data, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, data, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program)
	cmd.Env = append(env, asStranger+"="+runDir, "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	return cmd
}

// openDir makes a run directory below directories that everybody may enter.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "shunt-podcache-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "run")
}

// TestPrivilegedStranger: somebody who is not root can't even connect; and
// where somebody has opened the way to them, gets no answer.
func TestPrivilegedStranger(t *testing.T) {
	testbed.Privileged(t)
	runDir := openDir(t)
	n := newNode(t, func(o *Options) { o.RunDir = runDir })
	n.runDir = runDir
	n.api.Set(meshed("a", "1"))
	n.runSynced()
	n.want("a", "1", "1", 0)
	ask := func(want string) {
		t.Helper()
		out, err := stranger(t, runDir).CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) || strings.Contains(string(out), "istio-proxy") {
			t.Errorf("got %v: %s\nwant %q", err, out, want)
		}
	}
	ask("permission denied")
	if err := os.Chmod(runDir, 0o755); err != nil {
		t.Fatal(err)
	}
	ask("permission denied")
	if err := os.Chmod(SocketPath(runDir), 0o666); err != nil {
		t.Fatal(err)
	}
	ask("<nil> ")
	if !strings.Contains(n.log.String(), "not root") || !strings.Contains(n.log.String(), "uid=65534") {
		t.Errorf("log: %s", n.log)
	}
	n.want("a", "1", "1", 0)
}

// TestPrivilegedImpostor: the plugin believes nobody's socket but root's.
func TestPrivilegedImpostor(t *testing.T) {
	testbed.Privileged(t)
	runDir := openDir(t)
	if err := os.Mkdir(runDir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(runDir, 0o777); err != nil {
		t.Fatal(err)
	}
	cmd := stranger(t, runDir, "LISTEN=1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	n := &node{t: t, runDir: runDir}
	n.eventually(func() error {
		_, err := n.ask("a", "1")
		if err == nil || !strings.Contains(err.Error(), "the socket is uid 65534's, not root's") {
			return fmt.Errorf("got %w", errors.Join(err))
		}
		return nil
	})
}
