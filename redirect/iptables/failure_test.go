// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// applyEnv makes the test binary apply what a file says, as a process that can
// be killed.
const applyEnv = "SHUNT_IPTABLES_APPLY"

// applied is that file.
type applied struct {
	Options struct {
		RunDir, Path string
		Mode         Mode
	}
	Target redirect.Target
	Policy *redirect.Policy
}

func init() {
	file := os.Getenv(applyEnv)
	if file == "" {
		return
	}
	var x applied
	data, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(data, &x)
	}
	if err == nil {
		b := New(Options{RunDir: x.Options.RunDir, Path: x.Options.Path, Mode: x.Options.Mode})
		err = b.Apply(context.Background(), x.Target, x.Policy)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// programs makes a folder with the node's iptables programs of a mode, those of
// names replaced by a shell script. REAL stands in it for the real program.
func programs(t testing.TB, m Mode, script string, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, ip := range []string{"iptables", "ip6tables"} {
		for _, verb := range []string{"restore", "save"} {
			name := ip + "-" + string(m) + "-" + verb
			program, err := lookPath(DefaultPath, name)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(program, filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, name := range names {
		program, err := lookPath(DefaultPath, name)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, name)
		_ = os.Remove(file)
		if err := os.WriteFile(file, []byte("#!/bin/sh\n"+strings.ReplaceAll(script, "REAL", program)+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestPrivilegedPrograms: programs that are missing, that hang, that fail.
func TestPrivilegedPrograms(t *testing.T) {
	begin(t)
	const timeout = 3 * time.Second // in which those that end do, on a machine that is busy
	all := []string{"iptables-nft-restore", "ip6tables-nft-restore", "iptables-nft-save", "ip6tables-nft-save"}
	for _, c := range []struct {
		name, script string
		names        []string
		says         []string
		is           error
	}{
		{"fails", "cat >&2 <<X\nno such table\nX\nexit 3", []string{"iptables-nft-restore"}, []string{"iptables-nft-restore", "exit status 3", "no such table"}, nil},
		{"fails for IPv6", "echo no IPv6 here >&2; exit 1", []string{"ip6tables-nft-restore"}, []string{"program the pod's IPv6", "no IPv6 here"}, nil},
		{"hangs", "exec sleep 1000", all, []string{"did not end within 3s and was killed"}, nil},
		{"hangs for IPv6", "exec sleep 1000", []string{"ip6tables-nft-restore"}, []string{"ip6tables-nft-restore: did not end within 3s and was killed"}, nil},
		{"hangs with children", "sleep 1000 & sleep 1000", []string{"ip6tables-nft-restore"}, []string{"did not end within 3s and was killed"}, nil},
		{"talks without end", "exec yes >&2", []string{"ip6tables-nft-restore"}, []string{"signal: broken pipe: y y y"}, nil},
		{"dies", "kill -9 $$", []string{"ip6tables-nft-restore"}, []string{"signal: killed"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := testbed.NewPod(t)
			n := newNode(t, func(o *Options) {
				o.Mode, o.Path, o.Timeout = NFT, programs(t, NFT, c.script, c.names...)+":"+DefaultPath, timeout
			})
			start := time.Now()
			err := n.Apply(t.Context(), targetOf(p), evaluate(t, redirect.DefaultConfig(), p))
			if took := time.Since(start); took > 5*timeout {
				t.Errorf("it took %v", took)
			}
			if err == nil {
				t.Fatal("apply succeeds")
			}
			t.Log(err)
			for _, s := range c.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%v: does not say %q", err, s)
				}
			}
			if left := residue(t, NFT, p); left != "" {
				t.Errorf("left behind:\n%s", left)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		p := testbed.NewPod(t)
		for _, m := range []Mode{Auto, NFT, Legacy} {
			n := newNode(t, func(o *Options) { o.Mode, o.Path = m, t.TempDir() })
			err := n.Apply(t.Context(), targetOf(p), evaluate(t, redirect.DefaultConfig(), p))
			if !errors.Is(err, ErrNotInstalled) || !strings.Contains(err.Error(), "install the package iptables") {
				t.Errorf("mode %s: %v", m, err)
			}
			if err := n.Ready(t.Context()); !errors.Is(err, ErrNotInstalled) {
				t.Errorf("mode %s: ready: %v", m, err)
			}
			t.Log(err)
		}
	})
	t.Run("not a namespace", func(t *testing.T) {
		n := newNode(t)
		p := testbed.NewPod(t)
		target := targetOf(p)
		for path, says := range map[string]string{
			"/proc/self/ns/net": "host's own network namespace",
			t.TempDir():         "not a namespace",
			"/nowhere":          "no such file",
		} {
			target.Netns = path
			if err := n.Apply(t.Context(), target, evaluate(t, redirect.DefaultConfig(), p)); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v", path, err)
			}
		}
	})
}

// TestPrivilegedDetect: a node's mode is found once, and anew when its programs
// change.
func TestPrivilegedDetect(t *testing.T) {
	begin(t)
	p := testbed.NewPod(t)
	policy := evaluate(t, redirect.DefaultConfig(), p)
	run := t.TempDir()
	count := func(path string) (Mode, int64) {
		t.Helper()
		n := New(Options{RunDir: run, Path: path})
		if err := n.Apply(t.Context(), targetOf(p), policy); err != nil {
			t.Fatal(err)
		}
		k := n.children.Load()
		mode, err := n.Mode(t.Context())
		if err != nil {
			t.Error(err)
		}
		if err := n.Remove(t.Context(), targetOf(p).Attachment); err != nil {
			t.Error(err)
		}
		return mode, k
	}
	// Legacy programs first: nft leaves no table behind that is in their way.
	dir := programs(t, Legacy, "")
	if m, k := count(dir); m != Legacy || k > 4 {
		t.Errorf("%s by %d programs", m, k)
	}
	if m, k := count(dir); m != Legacy || k > 4 {
		t.Errorf("the second time, %s by %d programs", m, k)
	}
	other := programs(t, NFT, "exit 1", "iptables-nft-restore")
	for _, f := range []string{"iptables-legacy-restore", "ip6tables-legacy-restore", "iptables-legacy-save", "ip6tables-legacy-save"} {
		if err := os.Symlink(filepath.Join(dir, f), filepath.Join(other, f)); err != nil {
			t.Fatal(err)
		}
	}
	if m, _ := count(other); m != Legacy {
		t.Errorf("nft that does not work is taken: %s", m)
	}
	fresh := testbed.NewPod(t)
	n := newNode(t)
	x := n.redirect(t, fresh)
	first := n.children.Load() // Check has run 2
	if first > 3+2 {
		t.Errorf("the first pod took %d programs", first-2)
	}
	again := &node{New(n.opts)}
	if err := again.Apply(t.Context(), targetOf(testbed.NewPod(t)), x.policy); err != nil {
		t.Fatal(err)
	}
	if k := again.children.Load(); k != 2 {
		t.Errorf("the second pod took %d programs", k)
	}
	list, err := again.Attachments(t.Context(), "shunt")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		if err := again.Remove(t.Context(), a); err != nil {
			t.Error(err)
		}
	}
}

// TestPrivilegedKilled kills an Apply, with all it has started, after each
// table of each family: what has begun is never half open. Then it is completed
// by another Apply, or removed.
func TestPrivilegedKilled(t *testing.T) {
	begin(t)
	modes(t, func(t *testing.T, n *node) {
		for _, c := range []struct {
			name   string
			tables int
			m      []testbed.PodMutator
		}{
			{"REDIRECT", 1, annotations(includeInbound, "*")},
			{"REDIRECT and DNS", 3, append(annotations(includeInbound, "*"), testbed.ProxyEnv(dnsCaptureEnv, "true"), testbed.ProxyEnv(invalidDropEnv, "true"))},
			{"TPROXY and DNS", 3, append(annotations(includeInbound, "*", interceptionMode, "TPROXY"), testbed.ProxyEnv(dnsCaptureEnv, "true"))},
		} {
			for at := 1; at <= 2*c.tables; at++ {
				family, tables := IPv4, at
				if at > c.tables {
					family, tables = IPv6, at-c.tables
				}
				t.Run(fmt.Sprintf("%s, after %d of %v", c.name, tables, family), func(t *testing.T) {
					killed(t, n, family, tables, at%2 == 0, c.m...)
				})
			}
		}
	})
}

func killed(t *testing.T, n *node, family Family, tables int, complete bool, mutators ...testbed.PodMutator) {
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	p := testbed.NewPod(t, testbed.InWorld(w))
	policy := evaluate(t, redirect.DefaultConfig(), p, mutators...)
	target := targetOf(p)

	name := "iptables"
	if family == IPv6 {
		name = "ip6tables"
	}
	name += "-" + string(n.opts.Mode) + "-restore"
	// Detection hands over one table too, in a namespace of its own.
	script := fmt.Sprintf(`awk '{print} /PROBE/{p=1} /^COMMIT/{if(++c==%d) exit}' >%s/in
REAL --noflush <%[2]s/in || exit 9
grep -q PROBE %[2]s/in || kill -9 $PPID`, tables, t.TempDir())
	x := applied{Target: target, Policy: policy}
	x.Options.RunDir, x.Options.Mode = n.opts.RunDir, n.opts.Mode
	x.Options.Path = programs(t, n.opts.Mode, script, name)
	data, err := json.Marshal(x)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "apply.json")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{applyEnv + "=" + file, "GORACE=atexit_sleep_ms=0", "XTABLES_LOCKFILE=" + filepath.Join(t.TempDir(), "lock")}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("apply was not killed: %v\n%s", err, out)
	}

	app := p.StartApp(t, 8080)
	never := func(what string, r testbed.ConnectResult, open string) {
		t.Helper()
		if r.Listener() == open || r.Connected() && !redirected(r.Listener()) {
			t.Errorf("%s goes directly: %+v", what, r)
		}
	}
	for _, proxy := range []bool{false, true} {
		if proxy {
			p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID)
		}
		dst, own := "10.99.1.1:80", p.Addr4()
		if family == IPv6 {
			dst, own = "[fd99::5]:80", p.Addr6()
		}
		never("outbound", app.Connect(t, testbed.ConnectSpec{Dst: ap(dst), Abort: true, Timeout: 500 * time.Millisecond}), "world")
		never("inbound", w.Connect(t, testbed.ConnectSpec{Dst: at(own, 8080), Abort: true, Timeout: 500 * time.Millisecond}), "app")
	}
	if err := n.Check(t.Context(), target); err == nil {
		t.Error("check passes")
	}
	if complete {
		if err := n.Apply(t.Context(), target, policy); err != nil {
			t.Fatalf("apply after it was killed: %v", err)
		}
		if err := n.Check(t.Context(), target); err != nil {
			t.Errorf("check: %v", err)
		}
	}
	if err := n.Remove(t.Context(), target.Attachment); err != nil {
		t.Errorf("remove: %v", err)
	}
	if left := residue(t, n.opts.Mode, p); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
}
