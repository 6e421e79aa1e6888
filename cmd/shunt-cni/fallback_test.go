// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/answer"
	"shunt.dev/shunt/internal/cni"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// refuseBPF makes commands of bpf(2) fail for this process and its children, as
// a kernel does that does not know them, or does not like what it is given.
// words are the errno and the commands, all of them numbers.
func refuseBPF(words []string) error {
	var numbers []uint32
	for _, w := range words {
		n, err := strconv.ParseUint(w, 10, 16)
		if err != nil {
			return err
		}
		numbers = append(numbers, uint32(n))
	}
	const nr, arg0 = 0, 16 // offsets in struct seccomp_data
	statement := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	jump := func(k uint32, yes, no int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jt: uint8(yes), Jf: uint8(no)}
	}
	commands := numbers[1:]
	filter := []unix.SockFilter{
		statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, nr),
		jump(unix.SYS_BPF, 0, len(commands)+1),
		statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, arg0),
	}
	for i, c := range commands {
		filter = append(filter, jump(c, len(commands)-i, 0))
	}
	filter = append(filter,
		statement(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW),
		statement(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ERRNO|numbers[0]),
	)
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
}

// refuseCookies makes SO_NETNS_COOKIE fail for this process and its children, as
// before Linux 5.14.
func refuseCookies() error {
	const nr, arg1, arg2 = 0, 24, 32 // offsets in struct seccomp_data
	statement := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	jump := func(k uint32, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jf: no}
	}
	filter := []unix.SockFilter{
		statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, nr),
		jump(unix.SYS_GETSOCKOPT, 5),
		statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, arg1),
		jump(unix.SOL_SOCKET, 3),
		statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, arg2),
		jump(unix.SO_NETNS_COOKIE, 1),
		statement(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ERRNO|uint32(unix.ENOPROTOOPT)),
		statement(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW),
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
}

// refusing has the plugin run on a kernel whose bpf(2) fails at some commands.
func (n *node) refusing(t testing.TB, errno unix.Errno, commands ...int) {
	t.Helper()
	n.wrap(t, wrapNoBPF+"="+strings.Trim(fmt.Sprint(append([]int{int(errno)}, commands...)), "[]"))
}

// ruled reports whether there are rules of ours in a pod.
func ruled(t testing.TB, p *testbed.Pod) bool {
	t.Helper()
	return strings.Contains(p.Command(t, "iptables-save")+p.Command(t, "ip6tables-save"), "SHUNT")
}

// impossible are the ways in which eBPF can't be had.
var impossible = []struct {
	name   string
	make   func(t *testing.T, n *node, p *testbed.Pod)
	reason redirect.ReasonName
	says   []string
}{
	{
		"no cgroup2", func(_ *testing.T, n *node, _ *testbed.Pod) { n.PluginCgroupRoot = "/proc" },
		redirect.ReasonNoCgroup2,
		[]string{"cgroupRoot: /proc is not on a cgroup2 file system"},
	},
	{
		"no pod cgroup", func(t *testing.T, _ *node, p *testbed.Pod) { p.RemoveCgroup(t) },
		redirect.ReasonNoPodCgroup,
		[]string{"no cgroup of the pod", "looked for"},
	},
	{
		"no bpffs", func(t *testing.T, n *node, _ *testbed.Pod) { n.BPFDir = filepath.Join(t.TempDir(), "bpf") },
		redirect.ReasonNoBPFFS,
		[]string{"no bpffs: bpfDir: ", "is not in one: mount one"},
	},
	{
		"no netns cookies", func(t *testing.T, n *node, _ *testbed.Pod) { n.wrap(t, wrapNoCookies+"=1") },
		redirect.ReasonLoadRefused,
		[]string{"the kernel refuses the datapath", "get its cookie (since Linux 5.14): protocol not available"},
	},
	{
		"no bpf(2)", func(t *testing.T, n *node, _ *testbed.Pod) {
			n.refusing(t, unix.ENOSYS, unix.BPF_MAP_CREATE, unix.BPF_PROG_LOAD, unix.BPF_BTF_LOAD, unix.BPF_LINK_CREATE, unix.BPF_OBJ_PIN, unix.BPF_OBJ_GET)
		},
		redirect.ReasonLoadRefused,
		[]string{"load the datapath", "function not implemented"},
	},
	{
		"a program is refused", func(t *testing.T, n *node, _ *testbed.Pod) { n.refusing(t, unix.EINVAL, unix.BPF_PROG_LOAD) },
		redirect.ReasonLoadRefused,
		[]string{"the kernel refuses the datapath"},
	},
	{
		"BPF is not permitted", func(t *testing.T, n *node, _ *testbed.Pod) { n.refusing(t, unix.EPERM, unix.BPF_PROG_LOAD) },
		redirect.ReasonNoPermission,
		[]string{"operation not permitted", "CAP_BPF"},
	},
	{
		"links are refused", func(t *testing.T, n *node, _ *testbed.Pod) { n.refusing(t, unix.EINVAL, unix.BPF_LINK_CREATE) },
		redirect.ReasonAttachRefused,
		[]string{"attach CGroupSockOps: invalid argument"},
	},
}

// TestPrivilegedFallback: where eBPF can't be had, auto redirects by iptables
// and says why; ebpf fails and says why; either way nothing of the attempt is
// left.
func TestPrivilegedFallback(t *testing.T) {
	w := begin(t)
	for _, c := range impossible {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, w)
			p := n.pod(t)
			c.make(t, n, p)
			before := n.left(t)
			expect := func(what, text string) {
				t.Helper()
				for _, says := range c.says {
					if !strings.Contains(text, says) {
						t.Errorf("%s does not say %q: %s", what, says, text)
					}
				}
			}

			r := n.Add(t, p, testbed.Set("datapath", "ebpf"))
			if r.ExitCode != 1 || r.Code() != cni.CodeProgram {
				t.Fatalf("datapath ebpf: %s", r)
			}
			expect("the error", message(r))
			if now := n.left(t); !slices.Equal(now, before) || ruled(t, p) {
				t.Errorf("datapath ebpf left %v, rules %v; before: %v", now, ruled(t, p), before)
			}

			for range 2 { // and again
				r = n.MustAdd(t, p)
				if string(r.Stdout) != prevResult(t, p, "1.1.0") {
					t.Errorf("ADD printed %s", r.Stdout)
				}
				expect("the log", strings.ReplaceAll(string(r.Stderr), `\"`, `"`))
				if want := `iptables takes over" command=ADD`; !strings.Contains(string(r.Stderr), want) ||
					!strings.Contains(string(r.Stderr), fmt.Sprintf("reason=%s ", c.reason)) {
					t.Errorf("the log does not give reason %s: %s", c.reason, r.Stderr)
				}
			}
			n.MustCheck(t, p)
			expectRedirectedUnplaced(t, n, p)
			if !ruled(t, p) || len(glob(t, n.BPFDir+"/netns/*")) > 0 {
				t.Errorf("rules %v, links %v", ruled(t, p), glob(t, n.BPFDir+"/netns/*"))
			}
			n.MustDel(t, p)
			if now := n.left(t); !slices.Equal(now, before) || ruled(t, p) {
				t.Errorf("DEL left %v, rules %v; before: %v", now, ruled(t, p), before)
			}
		})
	}
}

// expectRedirectedUnplaced is expectRedirected for a pod that may have no cgroup
// for its processes to be in.
func expectRedirectedUnplaced(t *testing.T, n *node, p *testbed.Pod) {
	t.Helper()
	if _, err := os.Stat(p.CgroupPath()); err == nil {
		n.expectRedirected(t, p)
		return
	}
	dst := netip.MustParseAddrPort("10.99.3.4:80")
	if err := p.Do(func() error { return connectRefused(dst) }); err != nil {
		t.Error(err)
	}
}

// connectRefused connects as a user who is not the proxy, from the thread's
// namespace, and fails unless the connection is refused: where no proxy listens,
// that is what redirection does.
func connectRefused(dst netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(dst.Port()), Addr: dst.Addr().As4()})
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("connect to %v: got %w, want ECONNREFUSED by the proxy's absence", dst, err)
	}
	return nil
}

// TestPrivilegedRefusalIsKept: on a node whose kernel has refused the datapath,
// the next pod does not load it again to be told the same; after a boot, or by
// an operator's hand, it does.
func TestPrivilegedRefusalIsKept(t *testing.T) {
	n := newNode(t, begin(t))
	plugin, env := n.Plugin, n.Env
	n.refusing(t, unix.EINVAL, unix.BPF_PROG_LOAD)
	first := n.pod(t)
	n.MustAdd(t, first)
	n.Plugin, n.Env = plugin, env

	kept := filepath.Join(n.RunDir, "refused")
	text, err := os.ReadFile(kept)
	if err != nil {
		t.Fatal(err)
	}
	p := n.pod(t)
	if r := n.MustAdd(t, p); !ruled(t, p) || !strings.Contains(string(r.Stderr), "found earlier") || !strings.Contains(string(r.Stderr), kept) {
		t.Errorf("rules %v, log %s", ruled(t, p), r.Stderr)
	}
	for name, change := range map[string]string{"another build": `{"Build":"0`, "another boot": `"Boot":"0`, "broken": `{`} {
		key, _, _ := strings.Cut(change, ":")
		broken := strings.Replace(string(text), key+`:"`, change, 1)
		if name == "broken" {
			broken = change
		}
		if err := os.WriteFile(kept, []byte(broken), 0o600); err != nil {
			t.Fatal(err)
		}
		n.MustAdd(t, p)
		n.expectRedirected(t, p)
		if ruled(t, p) {
			t.Errorf("%s: the pod still has rules", name)
		}
		for _, dir := range glob(t, n.BPFDir+"/datapath-*") { // as after a boot
			n.MustDel(t, p)
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}
	}
	n.MustDel(t, first)
	n.MustDel(t, p)
}

// TestPrivilegedNoCapability: what fails for want of privilege may look like a
// kernel's refusal, and must not be kept as one.
func TestPrivilegedNoCapability(t *testing.T) {
	n := newNode(t, begin(t))
	p := n.pod(t)
	plugin, env := n.Plugin, n.Env
	n.without(t, unix.CAP_SYS_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON)
	r := n.Run(t, "STATUS", p, testbed.Set("datapath", "ebpf"))
	if r.Code() != 50 || !strings.Contains(message(r), "no permission") && !strings.Contains(message(r), "operation not permitted") {
		t.Errorf("STATUS without capabilities: %s", r)
	}
	n.Plugin, n.Env = plugin, env
	if _, err := os.Stat(filepath.Join(n.RunDir, "refused")); err == nil {
		t.Error("the refusal is kept")
	}
	n.MustAdd(t, p, testbed.Set("datapath", "ebpf"))
	n.MustDel(t, p)
}

// programs makes a folder of iptables programs that are shell scripts.
func programs(t *testing.T, script string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, verb := range []string{"restore", "save"} {
			path := filepath.Join(dir, name+"-nft-"+verb)
			body := strings.ReplaceAll(script, "REAL", "/usr/sbin/"+name+"-nft-"+verb)
			if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// TestPrivilegedBadIptables: iptables programs that are not there, hang, fail or
// are killed. ADD fails, within its bound, says what is wrong, and leaves
// nothing: where iptables is asked for, and where eBPF can't be had.
func TestPrivilegedBadIptables(t *testing.T) {
	w := begin(t)
	for _, c := range []struct {
		name   string
		path   func(t *testing.T) string
		slow   bool
		says   []string
		status bool // STATUS knows it before a pod comes
	}{
		{"not there", func(t *testing.T) string { return t.TempDir() }, false, []string{"no iptables programs", "install the package iptables"}, true},
		{"hangs", func(t *testing.T) string { return programs(t, "sleep 1000 & wait") }, true, []string{"did not end within 10s and was killed"}, false},
		{"fails", func(t *testing.T) string {
			return programs(t, "echo 'iptables-restore v9: Table does not exist' >&2; exit 3")
		}, false, []string{"Table does not exist", "exit status 3"}, true},
		{"fails for IPv6", func(t *testing.T) string {
			return programs(t, `case $0 in *ip6*) echo "no IPv6 here" >&2; exit 4;; esac; exec REAL "$@"`)
		}, false, []string{"IPv6", "no IPv6 here", "exit status 4"}, false},
		{"is killed", func(t *testing.T) string { return programs(t, "kill -9 $$") }, false, []string{"signal: killed"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, w)
			n.Env = append(n.Env, "PATH="+c.path(t))
			configs := []map[string]any{{"datapath": "iptables"}, {"datapath": "auto", "cgroupRoot": "/proc"}}
			if c.slow {
				configs = configs[1:]
			}
			for _, config := range configs {
				n.Config = config
				p := n.pod(t)
				r := n.Add(t, p)
				if r.ExitCode != 1 || r.Code() != cni.CodeProgram || len(r.Stdout) == 0 {
					t.Fatalf("%v: %s", config, r)
				}
				if r.Elapsed > 30*time.Second {
					t.Errorf("%v: it took %v", config, r.Elapsed)
				}
				says := c.says
				if config["datapath"] == "auto" {
					says = append(says, "no cgroup2", "datapath iptables, which was to take over")
				}
				for _, s := range says {
					if !strings.Contains(message(r), s) {
						t.Errorf("%v: the error does not say %q: %s", config, s, message(r))
					}
				}
				n.expectNothing(t, p)
				if ruled(t, p) {
					t.Errorf("%v: rules are left", config)
				}
				if c.status {
					r := n.Run(t, "STATUS", p)
					if r.Code() != 50 {
						t.Errorf("%v: STATUS: %s", config, r)
					}
					// The agent says the same on /readyz.
					if said, err := answer.Read(n.RunDir); err != nil || said == nil || said.Able || !strings.Contains(message(r), said.Text) {
						t.Errorf("%v: the agent is told %+v, %v; not %s", config, said, err, message(r))
					}
				}
			}
		})
	}
}

// TestPrivilegedChildren: how many programs an ADD by iptables starts. Each is
// some milliseconds of a pod's start.
func TestPrivilegedChildren(t *testing.T) {
	n := newNode(t, begin(t))
	log := filepath.Join(t.TempDir(), "log")
	n.Env = append(n.Env, "PATH="+programs(t, `echo "$0 $*" >> `+log+`; exec REAL "$@"`))
	n.Config = map[string]any{"datapath": "iptables"}
	for _, add := range []struct {
		name string
		most int
	}{{"the node's first", 4}, {"another", 2}, {"a third", 2}} {
		p := n.pod(t)
		if err := os.WriteFile(log, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		n.MustAdd(t, p)
		started, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		if count := strings.Count(string(started), "\n"); count == 0 || count > add.most {
			t.Errorf("%s started %d programs, want at most %d:\n%s", add.name, count, add.most, started)
		}
		n.expectRedirected(t, p)
		n.MustDel(t, p)
	}
}
