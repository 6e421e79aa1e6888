// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/cni"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
)

// These tests are what docs/SECURITY.md says, claim by claim.

// intrusion in the environment makes the test binary a process of a pod's that
// tries what a hostile one would.
const intrusion = "SHUNT_CNI_TEST_INTRUSION"

// An intruder is that process. It is started as root, makes itself what it is to
// be, and becomes the same program again.
type intruder struct {
	Stage          string // how far it has come
	UID            int
	Caps           []int // that it keeps
	UserNamespace  bool  // tries from one of its own, with every capability there
	BPFDir, RunDir string
	Bare           bool   // sees the host's files; else it has a container's mounts
	PodCgroup      string // of the pod
	Cgroup2        string // where that is mounted
	// What it would get at: pins and a file, by their paths; and the kernel's
	// objects, by their ids.
	MapPin, LinkPin, Record string
	Map, Prog, Link         uint32
}

func init() {
	text := os.Getenv(intrusion)
	if text == "" {
		return
	}
	var x intruder
	err := json.Unmarshal([]byte(text), &x)
	if err == nil {
		err = map[string]func(*intruder) error{"": (*intruder).contain, "contained": (*intruder).shed, "shed": (*intruder).enter, "entered": (*intruder).intrude}[x.Stage](&x)
	}
	if err != nil {
		fmt.Println("intruder:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// again becomes the same program, at another stage.
func (x *intruder) again(stage string) error {
	x.Stage = stage
	b, err := json.Marshal(x)
	if err != nil {
		return err
	}
	return syscall.Exec("/proc/self/exe", []string{"intruder"}, []string{intrusion + "=" + string(b), quietRace, "PATH=" + os.Getenv("PATH")})
}

// contain gives the process what a container runtime does: a mount namespace
// without the host's bpffs and run directory, in which cgroups can't be written.
// init functions run on the process's first thread, and so does what it becomes.
func (x *intruder) contain() error {
	if x.Bare {
		return x.again("contained")
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mounts: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, dir := range []string{filepath.Dir(x.BPFDir), x.RunDir} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return fmt.Errorf("hide %s: %w", dir, err)
		}
	}
	if err := unix.Mount("", x.Cgroup2, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", x.Cgroup2, err)
	}
	return x.again("contained")
}

// shed gives up the rest.
func (x *intruder) shed() error {
	for c := range unix.CAP_LAST_CAP + 1 {
		if slices.Contains(x.Caps, c) {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	if x.UID != 0 {
		// Of this thread alone, which is all that is left of the process then.
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if _, _, errno := unix.RawSyscall(call, uintptr(x.UID), uintptr(x.UID), uintptr(x.UID)); errno != 0 {
				return errno
			}
		}
	}
	return x.again("shed")
}

// enter makes the user namespace, which takes a child: a Go program has threads.
func (x *intruder) enter() error {
	if !x.UserNamespace {
		return x.intrude()
	}
	x.Stage = "entered"
	b, err := json.Marshal(x)
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{intrusion + "=" + string(b), quietRace, "PATH=" + os.Getenv("PATH")}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: x.UID, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: x.UID, Size: 1}},
	}
	return cmd.Run()
}

// intrude tries, and says what came of each try.
func (x *intruder) intrude() error {
	for _, try := range []struct {
		name string
		do   func() error
	}{
		{"open a pinned map", func() error { return open(x.MapPin) }},
		{"open a pinned link", func() error { return open(x.LinkPin) }},
		{"read a record", func() error { return open(x.Record) }},
		{"reach the agent", func() error {
			conn, err := net.Dial("unix", filepath.Join(x.RunDir, "agent.sock"))
			if err == nil {
				conn.Close()
			}
			return err
		}},
		{"get a map by its id", func() error { return closed(byID(unix.BPF_MAP_GET_FD_BY_ID, x.Map)) }},
		{"get a program by its id", func() error { return closed(byID(unix.BPF_PROG_GET_FD_BY_ID, x.Prog)) }},
		{"detach a link by its id", func() error {
			fd, err := byID(unix.BPF_LINK_GET_FD_BY_ID, x.Link)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			attr := struct{ fd uint32 }{uint32(fd)}
			_, err = callBPF(unix.BPF_LINK_DETACH, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
			return err
		}},
		{"detach from the cgroup", func() error {
			dir, err := unix.Open(x.PodCgroup, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(dir)
			attr := struct{ target, prog, kind, flags uint32 }{uint32(dir), 0, uint32(ebpf.AttachCGroupInet4Connect), 0}
			_, err = callBPF(unix.BPF_PROG_DETACH, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
			return err
		}},
		{"displace ours at the cgroup", func() error { return x.displace() }},
		{"leave the cgroup", func() error { return os.WriteFile(filepath.Join(x.Cgroup2, "cgroup.procs"), []byte("0"), 0) }},
		{"mount a bpffs of the host's", func() error {
			if err := unix.Mount("bpf", "/mnt", "bpf", 0, ""); err != nil {
				return err
			}
			entries, err := os.ReadDir("/mnt")
			if err == nil && len(entries) == 0 {
				return errors.New("it is another, which has nothing in it")
			}
			return err
		}},
		{"flush rules and qdiscs", func() error {
			var errs []error
			for _, argv := range []string{"iptables -t nat -F", "ip6tables -t nat -F", "nft flush ruleset", "tc qdisc del dev eth0 clsact"} {
				f := strings.Fields(argv)
				errs = append(errs, exec.Command(f[0], f[1:]...).Run())
			}
			return errors.Join(errs...)
		}},
	} {
		err := try.do()
		fmt.Printf("%s: %v: %s\n", try.name, err != nil, strings.ReplaceAll(fmt.Sprint(err), "\n", "; "))
	}
	return nil
}

func open(path string) error {
	f, err := os.Open(path)
	if err == nil {
		f.Close()
	}
	return err
}

func callBPF(command int, attr unsafe.Pointer, size uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(attr), size)
	if errno != 0 {
		return -1, errno
	}
	return int(r), nil
}

func byID(command int, id uint32) (int, error) {
	attr := struct{ id, next, flags uint32 }{id: id}
	return callBPF(command, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

func closed(fd int, err error) error {
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// displace attaches a program that allows everything at the pod's cgroup, as the
// only one.
func (x *intruder) displace() error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.LoadImm(asm.R0, 1, asm.DWord), asm.Return()},
	})
	if err != nil {
		return err
	}
	defer prog.Close()
	dir, err := unix.Open(x.PodCgroup, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	return link.RawAttachProgram(link.RawAttachProgramOptions{Target: dir, Program: prog, Attach: ebpf.AttachCGroupInet4Connect})
}

// intrude runs an intruder in a pod to its end, and gives what it managed to do.
func (n *node) intrude(t *testing.T, p *testbed.Pod, x intruder) (did []string) {
	t.Helper()
	x.BPFDir, x.RunDir, x.PodCgroup = n.BPFDir, n.RunDir, p.CgroupPath()
	n.showTo(t, &x)
	b, err := json.Marshal(x)
	if err != nil {
		t.Fatal(err)
	}
	proc := p.Start(t, testbed.ProcessSpec{
		Argv: []string{"/proc/self/exe"}, Env: []string{intrusion + "=" + string(b), quietRace, "PATH=" + os.Getenv("PATH")},
	})
	if status := proc.Wait(t); status != 0 {
		t.Fatalf("the intruder ended with status %d: %s", status, proc.Output())
	}
	tries := 0
	for line := range strings.Lines(proc.Output()) {
		name, rest, ok := strings.Cut(strings.TrimSpace(line), ": ")
		failed, why, _ := strings.Cut(rest, ": ")
		if !ok || failed != "true" && failed != "false" {
			t.Fatalf("the intruder says %q", line)
		}
		t.Logf("%s: %s", name, why)
		if tries++; failed == "false" {
			did = append(did, name)
		}
	}
	if tries != 12 {
		t.Fatalf("the intruder has tried %d things: %s", tries, proc.Output())
	}
	return did
}

// showTo tells an intruder where to look.
func (n *node) showTo(t *testing.T, x *intruder) {
	t.Helper()
	one := func(dir, pattern string) string {
		t.Helper()
		paths := glob(t, filepath.Join(dir, pattern))
		if len(paths) == 0 {
			t.Fatalf("nothing is %s", pattern)
		}
		return paths[0]
	}
	var err error
	if x.Cgroup2, err = loader.FindCgroup2Mount(""); err != nil {
		t.Fatal(err)
	}
	x.MapPin = one(n.BPFDir, "datapath-*/"+bpf.ShuntMapPods)
	x.LinkPin = one(n.BPFDir, "cgroups/*/shunt_connect4")
	x.Record = one(n.RunDir, "attachments/*.json")
	theMap, err := ebpf.LoadPinnedMap(x.MapPin, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer theMap.Close()
	info, err := theMap.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID() // since Linux 4.13
	theLink, err := link.LoadPinnedLink(x.LinkPin, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer theLink.Close()
	about, err := theLink.Info()
	if err != nil {
		t.Fatal(err)
	}
	x.Map, x.Prog, x.Link = uint32(id), uint32(about.Program), uint32(about.ID)
}

// TestPrivilegedIntruder: nothing that runs in a pod switches its redirection off,
// gets at a map, a record or the agent, whatever of these it is. A privileged pod
// can; CHECK says so.
func TestPrivilegedIntruder(t *testing.T) {
	n := newNode(t, begin(t))
	netAdmin := []int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE}
	every := make([]int, unix.CAP_LAST_CAP+1)
	for c := range every {
		every[c] = c
	}
	for _, hook := range []string{"sk_lookup", "tc"} {
		p := testbed.NewPod(t, testbed.InWorld(n.world))
		n.api.SetPod(t, p.Namespace, p.Name, p.Injected(wishes[hook]...))
		n.MustAdd(t, p)
		socket := listenAsAgent(t, n)
		for _, c := range []struct {
			name string
			x    intruder
			can  []string // and nothing else
		}{
			{"a user", intruder{UID: testbed.AppUID}, nil},
			{"a user who sees the host's files", intruder{UID: testbed.AppUID, Bare: true}, nil},
			{"a user in a user namespace of its own", intruder{UID: testbed.AppUID, Bare: true, UserNamespace: true}, nil},
			{"the proxy's user", intruder{UID: testbed.ProxyUID}, nil},
			{"root without capabilities", intruder{}, nil},
			{"root with NET_ADMIN and NET_RAW", intruder{Caps: netAdmin}, nil},
			{"root with BPF, PERFMON and NET_ADMIN", intruder{Caps: append([]int{unix.CAP_BPF, unix.CAP_PERFMON}, netAdmin...)}, nil},
		} {
			t.Run(hook+", "+c.name, func(t *testing.T) {
				did := slices.DeleteFunc(n.intrude(t, p, c.x), func(s string) bool {
					// Its own rules are its own; ours are not among them.
					return s == "flush rules and qdiscs" && slices.Contains(c.x.Caps, unix.CAP_NET_ADMIN)
				})
				if !slices.Equal(did, c.can) {
					t.Errorf("it could %q, want %q", did, c.can)
				}
				n.MustCheck(t, p)
				expectHooks(t, p)
				n.expectRedirected(t, p)
			})
		}
		t.Run(hook+", privileged", func(t *testing.T) {
			did := n.intrude(t, p, intruder{Caps: every})
			if !slices.Contains(did, "detach a link by its id") {
				t.Errorf("it could %q: docs/SECURITY.md says more of a privileged pod", did)
			}
			if r := n.Check(t, p); r.Code() != cni.CodeDiffers || !strings.Contains(message(r), "not attached") {
				t.Errorf("CHECK: %s", r)
			}
		})
		socket.Close()
		n.MustDel(t, p)
	}
}

// listenAsAgent makes a socket as the agent's.
func listenAsAgent(t *testing.T, n *node) net.Listener {
	t.Helper()
	path := filepath.Join(n.RunDir, "agent.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return l
}

// needs are the capabilities that the plugin needs, by what a pod asks for. That
// SYS_ADMIN, without which nobody enters a network namespace, stands for BPF and
// PERFMON is the kernel's doing.
var needs = []struct {
	name   string
	config map[string]any
	wish   []testbed.PodMutator
	opts   []testbed.Option
	caps   map[string]int
}{
	{name: "ebpf, sk_lookup", config: map[string]any{"datapath": "ebpf"}, caps: capNetSys},
	{name: "ebpf, tc", config: map[string]any{"datapath": "ebpf", "inboundHook": "tc"}, caps: capNetSys},
	{name: "ebpf, TPROXY and DNS capture", config: map[string]any{"datapath": "ebpf"}, wish: wishes["tproxy"], caps: capNetSys},
	{name: "iptables-nft", config: map[string]any{"datapath": "iptables", "iptablesBackend": "nft"}, caps: capNetSys},
	{name: "iptables-legacy", config: map[string]any{"datapath": "iptables", "iptablesBackend": "legacy"}, caps: capNetSysRaw},
}

var (
	capNetSys    = map[string]int{"NET_ADMIN": unix.CAP_NET_ADMIN, "SYS_ADMIN": unix.CAP_SYS_ADMIN}
	capNetSysRaw = map[string]int{"NET_ADMIN": unix.CAP_NET_ADMIN, "SYS_ADMIN": unix.CAP_SYS_ADMIN, "NET_RAW": unix.CAP_NET_RAW}
)

// TestPrivilegedCapabilities: ADD, CHECK and DEL of a node that has just booted
// work with the capabilities that docs/SECURITY.md lists for each way, and ADD
// works with none of them missing.
func TestPrivilegedCapabilities(t *testing.T) {
	w := begin(t)
	for _, c := range needs {
		t.Run(c.name, func(t *testing.T) {
			trial := func(keep map[string]int) (r testbed.CNIResult) {
				n := newNode(t, w)
				n.Config = c.config
				p := testbed.NewPod(t, append([]testbed.Option{testbed.InWorld(w)}, c.opts...)...)
				n.api.SetPod(t, p.Namespace, p.Name, p.Injected(c.wish...))
				plugin, env := n.Plugin, n.Env
				var drop []int
				for i := range unix.CAP_LAST_CAP + 1 {
					if !slices.Contains(slices.Collect(maps.Values(keep)), i) {
						drop = append(drop, i)
					}
				}
				n.without(t, drop...)
				if r = n.Add(t, p); r.OK() {
					n.MustCheck(t, p)
					if len(c.wish) == 0 {
						n.expectRedirected(t, p)
					}
					n.MustDel(t, p)
				}
				n.Plugin, n.Env = plugin, env
				n.MustDel(t, p)
				n.expectUnruled(t, p)
				return r
			}
			if r := trial(c.caps); !r.OK() {
				t.Errorf("with what is listed: %s", r)
			}
			for name := range c.caps {
				fewer := map[string]int{}
				for k, v := range c.caps {
					if k != name {
						fewer[k] = v
					}
				}
				if r := trial(fewer); r.OK() {
					t.Errorf("%s is not needed", name)
				}
			}
		})
	}
}

// TestPrivilegedModes: whatever the plugin's umask is, what it makes is its own
// user's alone.
func TestPrivilegedModes(t *testing.T) {
	n := newNode(t, begin(t))
	n.wrap(t, wrapUmask+"=1")
	var pods []*testbed.Pod
	for _, wish := range wishes {
		p := testbed.NewPod(t, testbed.InWorld(n.world))
		n.api.SetPod(t, p.Namespace, p.Name, p.Injected(wish...))
		n.MustAdd(t, p)
		pods = append(pods, p)
	}
	seen := 0
	for _, dir := range []string{n.BPFDir, n.RunDir} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.Type()&fs.ModeSymlink != 0 {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			seen++
			want := fs.FileMode(0o600)
			if d.IsDir() {
				want = 0o700
			}
			if info.Mode().Perm() != want {
				t.Errorf("%s has mode %v, want %v", path, info.Mode().Perm(), want)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if seen < 30 {
		t.Errorf("%d files were seen", seen)
	}
	for _, p := range pods {
		n.MustDel(t, p)
	}
}

// TestPrivilegedForeignDirs: a runDir or bpfDir that others can put files into,
// or lead elsewhere, is refused by ADD before anything is done, and so is a link
// in the place of a file.
func TestPrivilegedForeignDirs(t *testing.T) {
	w := begin(t)
	link := func(dir string) error { return errors.Join(os.Mkdir(dir+"2", 0o700), os.Symlink(dir+"2", dir)) }
	open := func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o777)) }
	theirs := func(dir string) error {
		return errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, testbed.AppUID, testbed.AppGID))
	}
	inside := func(names ...string) func(string) error {
		return func(dir string) error {
			path := filepath.Join(append([]string{dir}, names...)...)
			return errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.Symlink(dir+"-target", path), os.WriteFile(dir+"-target", []byte("precious"), 0o600))
		}
	}
	for _, c := range []struct {
		name     string
		datapath string
		make     func(n *node) error
		says     string
	}{
		{"runDir is a link", "ebpf", func(n *node) error { return link(n.RunDir) }, "is a symbolic link"},
		{"runDir is a link, iptables", "iptables", func(n *node) error { return link(n.RunDir) }, "is a symbolic link"},
		{"runDir is writable", "ebpf", func(n *node) error { return open(n.RunDir) }, "can be written by others"},
		{"runDir is writable, iptables", "iptables", func(n *node) error { return open(n.RunDir) }, "can be written by others"},
		{"runDir is another's", "ebpf", func(n *node) error { return theirs(n.RunDir) }, "belongs to user"},
		{"runDir is another's, iptables", "iptables", func(n *node) error { return theirs(n.RunDir) }, "belongs to user"},
		{"bpfDir is a link", "ebpf", func(n *node) error { return link(n.BPFDir) }, "is a symbolic link"},
		{"bpfDir is writable", "ebpf", func(n *node) error { return open(n.BPFDir) }, "can be written by others"},
		{"bpfDir is another's", "ebpf", func(n *node) error { return theirs(n.BPFDir) }, "belongs to user"},
		{"the lock is a link", "ebpf", func(n *node) error { return inside("lock")(n.RunDir) }, "too many levels"},
		{"the lock of iptables is a link", "iptables", func(n *node) error { return inside("iptables", "lock")(n.RunDir) }, "too many levels"},
		{"the next record is a link", "ebpf", func(n *node) error { return inside("attachments", ".next")(n.RunDir) }, "too many levels"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, w)
			n.Config = map[string]any{"datapath": c.datapath}
			p := n.pod(t)
			if err := c.make(n); err != nil {
				t.Fatal(err)
			}
			r := n.Add(t, p)
			if r.Code() != cni.CodeProgram || !strings.Contains(message(r), c.says) {
				t.Errorf("ADD: %s; want an error that says %q", r, c.says)
			}
			if h := hooksOf(t, p); len(h) > 0 || ruled(t, p) {
				t.Errorf("it was programmed all the same: %v", h)
			}
			if b, err := os.ReadFile(n.RunDir + "-target"); err == nil && string(b) != "precious" {
				t.Errorf("what the link led to is now %q", b)
			}
			for _, dir := range []string{n.RunDir, n.BPFDir} { // or the node would complain of what is there
				for _, path := range glob(t, dir+"*") {
					if err := os.RemoveAll(path); err != nil {
						t.Fatal(err)
					}
				}
			}
		})
	}
}
