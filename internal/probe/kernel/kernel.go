// SPDX-License-Identifier: Apache-2.0

// Package kernel finds out what this kernel and host have of what the eBPF datapath
// needs, by trying.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/bpf/object"
	"shunt.dev/shunt/internal/probe"
	"shunt.dev/shunt/internal/probe/scratch"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
)

// Options say what Probe looks at.
type Options struct {
	BPFDir     string // see loader.Options
	CgroupRoot string // see loader.FindCgroup2Mount
	// ListenMPTCP starts a process in a cgroup, that listens by MPTCP in a
	// network namespace of its own, and waits for its end. nil: that is not
	// looked at. The error is unix.EPROTONOSUPPORT where there is no MPTCP.
	ListenMPTCP func(ctx context.Context, cgroup *os.File) error
}

// A prober makes rows.
type prober struct {
	opts Options
	caps uint64 // in effect, by their bits
	root bool   // this process may do what the plugin does
	hier string // where cgroup2 is mounted; empty without
	rows []probe.Row
}

// Probe finds out what this kernel and host have of what the eBPF datapath
// needs, by doing it: programs are the real ones, loaded and let go of, and
// what is attached, is attached to a cgroup and a network namespace that are
// made for it. Nothing is pinned, and nothing is left.
func Probe(ctx context.Context, opts Options) []probe.Row {
	p := &prober{opts: opts}
	p.capabilities()
	p.kernel()
	p.cgroups(ctx)
	p.programs()
	p.traffic()
	return p.rows
}

// noError is conclusive, whatever errno it wraps.
type noError struct{ error }

func (e noError) Unwrap() error { return e.error }

// unknownError is not conclusive, whatever errno it wraps.
type unknownError struct{ error }

func (e unknownError) Unwrap() error { return e.error }

// add makes a row of what came of trying. why is for the case of success.
func (p *prober) add(row probe.Row, why string, err error) {
	row.Answer, row.Why = p.answer(why, err)
	p.rows = append(p.rows, row)
}

func (p *prober) answer(why string, err error) (probe.Answer, string) {
	var no noError
	var unknown unknownError
	denied := errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES)
	switch {
	case err == nil:
		return probe.Yes, why
	case errors.As(err, &no):
		return probe.No, oneLine(err)
	case errors.As(err, &unknown) && (p.root || !denied):
		return probe.Unknown, oneLine(err)
	case !p.root:
		// Whatever it says: the library takes EPERM for a missing feature, in
		// places.
		return probe.Unknown, probe.NeedsRoot + ": " + oneLine(err)
	case errors.Is(err, unix.EPERM):
		return probe.Unknown, oneLine(err) + ", although this process has the capabilities: is it lockdown, a security module or a seccomp filter?"
	case conclusive(err):
		return probe.No, oneLine(err)
	}
	return probe.Unknown, oneLine(err)
}

// conclusive tells a kernel that has not what was asked for from one that could
// not give it now (ENOMEM, EAGAIN, EMFILE and whatever else there is).
func conclusive(err error) bool {
	for _, is := range []error{
		ebpf.ErrNotSupported, unix.EINVAL, unix.E2BIG, unix.ENOSYS, unix.EOPNOTSUPP, unix.ENOPROTOOPT, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT,
		unix.Errno(524), // ENOTSUPP, of the kernel's own
	} {
		if errors.Is(err, is) {
			return true
		}
	}
	return errors.Is(err, unix.EACCES) && refusedByVerifier(err)
}

func refusedByVerifier(err error) bool {
	var refused *ebpf.VerifierError
	return errors.As(err, &refused) && len(refused.Log) > 0
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

// capabilities that the plugin needs. CAP_SYS_ADMIN stands for the two that
// Linux 5.8 split from it (commits a17b53c4a4b5, 980737282232).
func (p *prober) capabilities() {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&hdr, &data[0])
	if err == nil {
		p.caps = uint64(data[0].Effective) | uint64(data[1].Effective)<<32
	}
	inside := inUserNamespace()
	p.root = !inside
	for _, c := range []struct {
		name, title string
		bit         uint
		orAdmin     bool
		since       string
		neededFor   string
		what        string
	}{
		{"cap-bpf", "CAP_BPF", unix.CAP_BPF, true, "5.8", probe.ForEBPF, "to load programs"},
		{"cap-perfmon", "CAP_PERFMON", unix.CAP_PERFMON, true, "5.8", probe.ForEBPF, "for programs that read the kernel's structures"},
		{"cap-net-admin", "CAP_NET_ADMIN", unix.CAP_NET_ADMIN, false, "", probe.ForEBPF, "to attach programs, and to change pods' networks"},
		{"cap-sys-admin", "CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN, false, "", probe.ForEBPF, "to enter pods' network namespaces"},
		{"cap-net-raw", "CAP_NET_RAW", unix.CAP_NET_RAW, false, "", probe.Optional, "for iptables-legacy"},
	} {
		row := probe.Row{Name: c.name, Group: probe.GroupCapabilities, Since: c.since, NeededFor: c.neededFor}
		by := c.title
		has := p.has(c.bit)
		if !has && c.orAdmin && p.has(unix.CAP_SYS_ADMIN) {
			has, by = true, "CAP_SYS_ADMIN, in place of "+c.title
		}
		p.root = p.root && (has || c.neededFor != probe.ForEBPF)
		switch {
		case err != nil:
			p.add(row, "", unknownError{fmt.Errorf("read this process's capabilities: %w", err)})
		case !has:
			// The plugin has what its runtime has: this process can't tell.
			row.Answer, row.Why = probe.Unknown, fmt.Sprintf("%s: this process lacks %s, %s", probe.NeedsRoot, c.title, c.what)
			p.rows = append(p.rows, row)
		case inside:
			row.Answer, row.Why = probe.Unknown, fmt.Sprintf("%s: this process has %s in a user namespace only", probe.NeedsRoot, by)
			p.rows = append(p.rows, row)
		default:
			p.add(row, by+", "+c.what, nil)
		}
	}
}

func (p *prober) has(bit uint) bool { return p.caps&(1<<bit) != 0 }

// inUserNamespace says whether this process's user namespace is not the first.
func inUserNamespace() bool {
	m, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && strings.Join(strings.Fields(string(m)), " ") != "0 0 4294967295"
}

func (p *prober) kernel() {
	row := func(name, since, neededFor string) probe.Row {
		return probe.Row{Name: name, Group: probe.GroupKernel, Since: since, NeededFor: neededFor}
	}

	var major, minor int
	release := loader.Release()
	_, err := fmt.Sscanf(release, "%d.%d", &major, &minor)
	switch {
	case err != nil:
		err = unknownError{fmt.Errorf("the kernel's release %q is no version: %w", release, err)}
	case major < 5 || major == 5 && minor < 17:
		err = noError{fmt.Errorf("version %s is older than 5.17; a distribution may have added what is needed: the rows of bpf tell", release)}
	}
	p.add(row("kernel", "5.17", probe.Optional), "Linux "+release, err)

	_, err = btf.LoadKernelSpec()
	if err != nil {
		err = fmt.Errorf("the kernel does not describe its types (CONFIG_DEBUG_INFO_BTF): %w", err)
		if errors.Is(err, fs.ErrNotExist) {
			err = noError{err}
		}
	}
	p.add(row("btf", "5.4", probe.ForEBPF), "the kernel describes its types", err)

	p.add(row("netns-cookie", "5.14", probe.ForEBPF), "network namespaces have cookies", netnsCookie())

	_, err = os.Stat("/proc/sys/net/ipv6")
	if errors.Is(err, fs.ErrNotExist) {
		err = noError{errors.New("the kernel has no IPv6: rows of IPv6 do not count")}
	}
	p.add(row("ipv6", "", probe.Optional), "the kernel has IPv6", err)
}

func netnsCookie() error {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return unknownError{fmt.Errorf("open a socket: %w", err)}
	}
	defer unix.Close(s)
	_, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	switch {
	case errors.Is(err, unix.ENOPROTOOPT):
		return noError{fmt.Errorf("getsockopt SO_NETNS_COOKIE: %w", err)}
	case err != nil:
		return unknownError{fmt.Errorf("getsockopt SO_NETNS_COOKIE: %w", err)}
	}
	return nil
}

func (p *prober) cgroups(ctx context.Context) {
	row := func(name, since, neededFor string) probe.Row {
		return probe.Row{Name: name, Group: probe.GroupCgroup, Since: since, NeededFor: neededFor}
	}
	mount, err := loader.FindCgroup2Mount(p.opts.CgroupRoot)
	p.hier = mount
	if errors.Is(err, loader.ErrNoCgroup2) {
		err = noError{err}
	}
	p.add(row("cgroup2", "4.5", probe.ForEBPF), "mounted at "+mount, err)

	pods, err := findPods(mount)
	r := row("cgroup-pods", "", probe.Optional)
	if err != nil && errors.As(err, new(noError)) {
		r.NeededFor = probe.ForEBPF // a pod of this host can't be served
	}
	p.add(r, pods, err)

	own, err := unified(mount)
	p.add(row("cgroup-unified", "", probe.Optional), own, err)

	p.add(row("cgroup-link", "5.7", probe.ForEBPF),
		"a program can be linked to a cgroup below the root, beside those of others (BPF_F_ALLOW_MULTI)", p.cgroupLink(ctx))

	if p.opts.ListenMPTCP != nil {
		why, err := p.mptcpListener(ctx)
		p.add(row("mptcp-listener", "", probe.Optional), why, err)
	}
}

// mountinfo is the mount table of this process.
var mountinfo = "/proc/self/mountinfo"

// kubepods are the cgroups below which kubelets put those of pods.
var kubepods = []struct{ path, layout string }{
	{"kubepods.slice", "systemd driver"},
	{"kubepods", "cgroupfs driver"},
	{"kubelet.slice/kubelet-kubepods.slice", "systemd driver, as in kind"},
	{"kubelet/kubepods", "cgroupfs driver, as in kind"},
}

// findPods says where pods lie. That they lie in hierarchies of version 1 only
// is conclusive; that they lie nowhere is not.
func findPods(mount string) (string, error) {
	if mount == "" {
		return "", unknownError{errors.New("cgroup2 is not mounted")}
	}
	for _, k := range kubepods {
		dir := filepath.Join(mount, k.path)
		if st, err := os.Stat(dir); err == nil && st.IsDir() {
			return fmt.Sprintf("in %s (%s)", dir, k.layout), nil
		}
	}
	v1, err := loader.Cgroup1Mounts(mountinfo)
	if err != nil {
		return "", unknownError{err}
	}
	for _, m := range v1 {
		for _, k := range kubepods {
			dir := filepath.Join(m, k.path)
			if st, err := os.Stat(dir); err == nil && st.IsDir() {
				return "", noError{fmt.Errorf("pods lie in %s, of cgroup version 1, and not below %s: have the host use cgroup2 alone", dir, mount)}
			}
		}
	}
	return "", unknownError{fmt.Errorf("no kubelet's cgroup is below %s, in any usual layout: none has run here, or it has a --cgroup-root of its own; pods are then found by their UID", mount)}
}

// unified fails where hierarchies of version 1 are mounted besides.
func unified(mount string) (string, error) {
	if mount == "" {
		return "", unknownError{errors.New("cgroup2 is not mounted")}
	}
	own := "unknown"
	if b, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		for line := range strings.Lines(string(b)) {
			if path, ok := strings.CutPrefix(line, "0::"); ok {
				own = strings.TrimSpace(path)
			}
		}
	}
	v1, err := loader.Cgroup1Mounts(mountinfo)
	if err != nil {
		return "", unknownError{err}
	}
	if len(v1) == 0 {
		return "cgroup2 is the only hierarchy; this process is in " + own, nil
	}
	return "", noError{fmt.Errorf("a hybrid host: cgroup version 1 is mounted too (%s and %d more), and this process is in %s of cgroup2; "+
		"a runtime older than runc 1.1 puts what exec starts in a container outside of the pod's cgroup2, from where it goes around the proxy: shunt status tells such processes",
		v1[0], len(v1)-1, own)}
}

// inCgroup calls fn with a cgroup of its own.
func (p *prober) inCgroup(ctx context.Context, fn func(c *scratch.Cgroup) error) (err error) {
	if p.hier == "" {
		return noError{errors.New("cgroup2 is not mounted")}
	}
	c, err := scratch.NewCgroup(p.hier)
	if err != nil {
		return unknownError{err}
	}
	defer func() {
		if gone := c.Remove(context.WithoutCancel(ctx)); gone != nil {
			err = errors.Join(err, unknownError{gone})
		}
	}()
	return fn(c)
}

// cgroupLink links a program that lets everything pass to a cgroup in which
// nothing is.
func (p *prober) cgroupLink(ctx context.Context) error {
	return p.inCgroup(ctx, func(c *scratch.Cgroup) error {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: bpf.License,
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		})
		if err != nil {
			return fmt.Errorf("load a program for it: %w", err)
		}
		defer prog.Close()
		l, err := attach(prog, int(c.Dir.Fd()), ebpf.AttachCGroupInet4Connect)
		if err != nil {
			if errors.Is(err, unix.EPERM) && p.root {
				err = noError{fmt.Errorf("%w: a program is attached to an ancestor so that it allows none below it; `bpftool cgroup tree` shows whose", err)}
			}
			return err
		}
		defer l.Close()
		q := progQueryAttr{targetFD: uint32(c.Dir.Fd()), attachType: uint32(ebpf.AttachCGroupInet4Connect)}
		if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_QUERY, uintptr(unsafe.Pointer(&q)), unsafe.Sizeof(q)); errno != 0 {
			return unknownError{fmt.Errorf("ask for what is attached: %w", errno)}
		}
		if q.count != 1 || q.attachFlags&unix.BPF_F_ALLOW_MULTI == 0 {
			return unknownError{fmt.Errorf("attached, but the kernel shows %d programs with flags %#x", q.count, q.attachFlags)}
		}
		return l.Detach()
	})
}

// attach attaches a program by a link, as the plugin does: to a cgroup beside those of
// others.
func attach(prog *ebpf.Program, target int, at ebpf.AttachType) (*link.RawLink, error) {
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: target, Program: prog, Attach: at})
	if err != nil {
		return nil, fmt.Errorf("%w %v: %w", loader.ErrAttach, at, err)
	}
	return l, nil
}

type progQueryAttr struct {
	targetFD    uint32
	attachType  uint32
	queryFlags  uint32
	attachFlags uint32
	ids         unsafe.Pointer
	count       uint32
	_           uint32
}

// mptcpListener registers an MPTCP listener as the sockops program does.
func (p *prober) mptcpListener(ctx context.Context) (why string, err error) {
	if p.hier == "" {
		return "", unknownError{errors.New("cgroup2 is not mounted")}
	}
	err = p.inCgroup(ctx, func(c *scratch.Cgroup) error {
		listeners, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.SockHash, KeySize: 4, ValueSize: 8, MaxEntries: 1})
		if err != nil {
			return unknownError{fmt.Errorf("make a sockhash: %w", err)}
		}
		defer listeners.Close()
		result, err := newResult()
		if err != nil {
			return err
		}
		defer result.Close()
		const listenCB, listenOp = 11, 0 // BPF_SOCK_OPS_TCP_LISTEN_CB; offset of op
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.SockOps, AttachType: ebpf.AttachCGroupSockOps, License: bpf.License,
			Instructions: slices.Concat(asm.Instructions{
				asm.Mov.Reg(asm.R6, asm.R1),
				asm.LoadMem(asm.R2, asm.R1, listenOp, asm.Word),
				asm.JNE.Imm(asm.R2, listenCB, "pass"),
				asm.StoreImm(asm.RFP, -4, 0, asm.Word),
				asm.LoadMapPtr(asm.R2, listeners.FD()),
				asm.Mov.Reg(asm.R3, asm.RFP),
				asm.Add.Imm(asm.R3, -4),
				asm.Mov.Imm(asm.R4, 0),
				asm.FnSockHashUpdate.Call(),
				asm.Mov.Reg(asm.R8, asm.R0),
			}, result.store(), asm.Instructions{
				asm.Mov.Imm(asm.R0, 1).WithSymbol("pass"),
				asm.Return(),
			}),
		})
		if err != nil {
			return unknownError{fmt.Errorf("load a program for it: %w", err)}
		}
		defer prog.Close()
		l, err := attach(prog, int(c.Dir.Fd()), ebpf.AttachCGroupSockOps)
		if err != nil {
			return unknownError{err}
		}
		defer l.Close()
		if err := p.opts.ListenMPTCP(ctx, c.Dir); errors.Is(err, unix.EPROTONOSUPPORT) {
			why = "MPTCP is off: there are no such listeners"
			return nil
		} else if err != nil {
			return unknownError{fmt.Errorf("listen by MPTCP: %w", err)}
		}
		switch errno, ran := result.read(); {
		case !ran:
			return unknownError{errors.New("the program did not see the listener")}
		case errno != 0:
			return noError{fmt.Errorf("put an MPTCP listener into a sockhash: %w: sk_lookup can't serve such a listener, and connections to it are refused; "+
				"have the proxy listen by TCP alone (Go: GODEBUG=multipathtcp=0), or give its pods the inbound hook tc", errno)}
		}
		why = "a listener that is of MPTCP can be registered"
		return nil
	})
	return why, err
}

// A result is where a program writes what a helper has answered.
type result struct{ *ebpf.Map }

const notRun = 1 // no errno, and no success

func newResult() (result, error) {
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err == nil {
		err = m.Put(uint32(0), int32(notRun))
	}
	if err != nil {
		return result{}, fmt.Errorf("make a map: %w", err)
	}
	return result{m}, nil
}

// store writes R8. It uses 8 bytes of the stack from -40 on.
func (r result) store() asm.Instructions {
	return asm.Instructions{
		asm.StoreImm(asm.RFP, -40, 0, asm.Word),
		asm.StoreMem(asm.RFP, -36, asm.R8, asm.Word),
		asm.LoadMapPtr(asm.R1, r.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -40),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, -36),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call(),
	}
}

func (r result) read() (errno unix.Errno, ran bool) {
	var v int32
	if err := r.Lookup(uint32(0), &v); err != nil || v == notRun {
		return 0, false
	}
	return unix.Errno(-v), true
}

// needs are the real programs, with the version since which the kernel has the
// last of what each needs.
var needs = []struct{ name, program, since, neededFor string }{
	// Pointers as arguments of global functions: e5069b9c23b3.
	{"bpf-connect4", bpf.ShuntProgShuntConnect4, "5.13", probe.ForEBPF},
	{"bpf-connect6", bpf.ShuntProgShuntConnect6, "5.13", probe.ForEBPF},
	// The attach types: 1b66d253610c.
	{"bpf-getpeername4", bpf.ShuntProgShuntGetpeername4, "5.8", probe.ForEBPF},
	{"bpf-getpeername6", bpf.ShuntProgShuntGetpeername6, "5.8", probe.ForEBPF},
	// bpf_get_netns_cookie: f1248dee954c and 6cf1770d63dd.
	{"bpf-getsockopt", bpf.ShuntProgShuntGetsockopt, "5.15", probe.ForEBPF},
	{"bpf-sockops", bpf.ShuntProgShuntSockops, "5.15", probe.ForEBPF},
	// Bounded loops: 2589726d12a1.
	{"bpf-adopt", bpf.ShuntProgShuntAdopt, "5.3", probe.ForEBPF},
	// As connect4.
	{"bpf-look", bpf.ShuntProgShuntLook, "5.13", probe.ForEBPF},
	// ingress_ifindex: f89315650ba3.
	{"bpf-stamp", bpf.ShuntProgShuntStamp, "5.17", probe.ForEBPF},
	{"bpf-sk-lookup", bpf.ShuntProgShuntSkLookup, "5.17", probe.ForEBPF},
	// As connect4.
	{"bpf-sendmsg4", bpf.ShuntProgShuntSendmsg4, "5.13", probe.ForEBPF},
	{"bpf-sendmsg6", bpf.ShuntProgShuntSendmsg6, "5.13", probe.ForEBPF},
	// bpf_sk_storage_get for these types: f7c6cb1d9728.
	{"bpf-recvmsg4", bpf.ShuntProgShuntRecvmsg4, "5.8", probe.ForEBPF},
	{"bpf-recvmsg6", bpf.ShuntProgShuntRecvmsg6, "5.8", probe.ForEBPF},
	// As connect4.
	{"bpf-tc", bpf.ShuntProgShuntTc, "5.13", probe.ForTC},
}

func (p *prober) programs() {
	row := func(name, since, neededFor string) probe.Row {
		return probe.Row{Name: name, Group: probe.GroupBPF, Since: since, NeededFor: neededFor}
	}
	spec, err := object.LoadShunt()
	if err != nil {
		p.add(row("bpf-datapath", "5.17", probe.ForEBPF), "", unknownError{fmt.Errorf("read the programs: %w", err)})
		return
	}
	for _, n := range needs {
		why, err := p.loadOne(spec, n.program)
		p.add(row(n.name, n.since, n.neededFor), why, err)
	}
	p.add(row("bpf-datapath", "5.17", probe.ForEBPF), "all programs and maps load together", programs.Try())

	p.add(row("netns-link", "5.9", probe.ForEBPF), "a program can be linked to a network namespace", netnsLink())

	why, err := p.bpffs()
	p.add(row("bpffs", "4.4", probe.ForEBPF), why, err)

	// What the programs can do without.
	for _, h := range []struct {
		name, since, without string
		typ                  ebpf.ProgramType
		helper               asm.BuiltinFunc
	}{
		{"bpf-set-retval", "5.18", "a refused connect ends with EPERM whatever the reason", ebpf.CGroupSockAddr, asm.FnSetRetval},
		{"bpf-mptcp-sock", "5.19", "getpeername of an MPTCP socket tells the proxy's address", ebpf.CGroupSockAddr, asm.FnSkcToMptcpSock},
	} {
		err := features.HaveProgramHelper(h.typ, h.helper)
		if err != nil {
			err = fmt.Errorf("%w: %s", err, h.without)
		}
		p.add(row(h.name, h.since, probe.Optional), "the helper is there", err)
	}
}

// loadOne loads one of the programs, with the maps that it uses, as
// package programs would: with what newer kernels have, else without.
func (p *prober) loadOne(all *ebpf.CollectionSpec, name string) (why string, err error) {
	for _, have := range []struct {
		mptcp, setRetval bool
		without          string
	}{{true, true, ""}, {false, true, "; bpf_skc_to_mptcp_sock is not used"}, {false, false, "; bpf_skc_to_mptcp_sock and bpf_set_retval are not used"}} {
		spec := alone(all, name)
		for v, on := range map[string]bool{bpf.ShuntVarHaveMptcp: have.mptcp, bpf.ShuntVarHaveSetRetval: have.setRetval} {
			if known := spec.Variables[v]; known != nil {
				if err := known.Set(on); err != nil {
					return "", unknownError{err}
				}
			}
		}
		coll, loadErr := ebpf.NewCollection(spec)
		if loadErr == nil {
			coll.Close()
			prog := all.Programs[name]
			return fmt.Sprintf("%v at %v, with %s%s", prog.Type, prog.AttachType, strings.Join(helpersOf(prog), ", "), have.without), nil
		}
		if err == nil {
			err = loadErr
		}
		if !conclusive(loadErr) {
			break
		}
	}
	if conclusive(err) {
		if missing := missingHelpers(all.Programs[name]); len(missing) > 0 {
			err = fmt.Errorf("the kernel lacks %s for this type of program: %w", strings.Join(missing, ", "), err)
		}
	}
	return "", err
}

// alone gives a collection of one program, and of what it refers to.
func alone(all *ebpf.CollectionSpec, name string) *ebpf.CollectionSpec {
	spec := all.Copy()
	for other := range spec.Programs {
		if other != name {
			delete(spec.Programs, other)
		}
	}
	used := map[string]bool{}
	for _, insn := range spec.Programs[name].Instructions {
		used[insn.Reference()] = true
	}
	for m := range spec.Maps {
		if !used[m] {
			delete(spec.Maps, m)
		}
	}
	for v, s := range spec.Variables {
		if !used[s.SectionName] {
			delete(spec.Variables, v)
		}
	}
	return spec
}

// missingHelpers names helpers of a program that the kernel is known not to
// have for its type, without those that it can do without.
func missingHelpers(prog *ebpf.ProgramSpec) (missing []string) {
	for _, helper := range calls(prog) {
		if helper == asm.FnSetRetval || helper == asm.FnSkcToMptcpSock {
			continue
		}
		if errors.Is(features.HaveProgramHelper(prog.Type, helper), ebpf.ErrNotSupported) {
			missing = append(missing, helperName(helper))
		}
	}
	return missing
}

// helpersOf names the helpers of a program, without those for maps, which every
// kernel has.
func helpersOf(prog *ebpf.ProgramSpec) (names []string) {
	for _, helper := range calls(prog) {
		if helper > asm.FnMapDeleteElem {
			names = append(names, helperName(helper))
		}
	}
	if len(names) == 0 {
		return []string{"no helper but those for maps"}
	}
	return names
}

// calls lists the helpers that a program calls.
func calls(prog *ebpf.ProgramSpec) (helpers []asm.BuiltinFunc) {
	for _, insn := range prog.Instructions {
		if insn.IsBuiltinCall() {
			helpers = append(helpers, asm.BuiltinFunc(insn.Constant))
		}
	}
	slices.Sort(helpers)
	return slices.Compact(helpers)
}

// helperName writes a helper's name as the kernel does: FnSkAssign is
// bpf_sk_assign.
func helperName(helper asm.BuiltinFunc) string {
	var b strings.Builder
	b.WriteString("bpf")
	for _, c := range strings.TrimPrefix(helper.String(), "Fn") {
		if 'A' <= c && c <= 'Z' {
			b.WriteByte('_')
			c += 'a' - 'A'
		}
		b.WriteRune(c)
	}
	return b.String()
}

// netnsLink links a program that lets everything pass to a network namespace in
// which nothing is.
func netnsLink() error {
	n, err := scratch.NewNetns()
	if err != nil {
		return unknownError{err}
	}
	defer n.Close()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: bpf.License,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		return fmt.Errorf("load a program for it: %w", err)
	}
	defer prog.Close()
	l, err := attach(prog, n.FD(), ebpf.AttachSkLookup)
	if err != nil {
		return err
	}
	defer l.Close()
	return l.Detach()
}

// bpffs says whether bpfDir lies in a bpffs, or the plugin can make it so. It
// mounts none where anybody would see it.
func (p *prober) bpffs() (string, error) {
	dir := filepath.Clean(p.opts.BPFDir)
	parent := dir
	for {
		if _, err := os.Stat(parent); err == nil || parent == "/" {
			break
		}
		parent = filepath.Dir(parent)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(parent, &st); err != nil {
		return "", unknownError{fmt.Errorf("statfs %s: %w", parent, err)}
	}
	if st.Type == unix.BPF_FS_MAGIC {
		return fmt.Sprintf("%s is in one", dir), nil
	}
	if !strings.HasPrefix(dir+"/", loader.BPFFSRoot+"/") {
		return "", noError{fmt.Errorf("bpfDir: %s is in none: mount one (mount -t bpf bpf %s)", dir, filepath.Dir(dir))}
	}
	d, err := scratch.Mount("bpf")
	if errors.Is(err, unix.ENODEV) {
		return "", noError{err} // CONFIG_BPF_SYSCALL is off
	}
	if err != nil {
		return "", unknownError{err}
	}
	d.Close()
	return fmt.Sprintf("none is mounted at %s; the plugin will mount it (one could be made)", loader.BPFFSRoot), nil
}
