// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FaultKind is what a [Fault] does.
type FaultKind int

// Kinds of faults.
const (
	// KillBefore ends the process by SIGKILL as it makes the call, which is
	// not carried out.
	KillBefore FaultKind = iota
	// KillAfter ends it when the call has been carried out, before it can
	// know of that.
	KillAfter
	// FailCall keeps the call from being carried out and has it return Errno.
	FailCall
)

// A Fault happens to a process at one of its steps. The zero value is none.
type Fault struct {
	Step  int // from 1 on; 0 = never
	Kind  FaultKind
	Errno unix.Errno // of FailCall
}

func (f Fault) String() string {
	switch {
	case f.Step == 0:
		return "no fault"
	case f.Kind == KillBefore:
		return fmt.Sprintf("killed before step %d", f.Step)
	case f.Kind == KillAfter:
		return fmt.Sprintf("killed after step %d", f.Step)
	}
	return fmt.Sprintf("%s at step %d", errnoName(f.Errno), f.Step)
}

// A Step is a system call by which a process changes something outside of it.
type Step struct {
	Call string // its name, such as "renameat"
	Arg  string // what it is about: a path, a bpf command
	// Done says that the process has seen it return; Err with what.
	Done bool
	Err  unix.Errno
}

func (s Step) String() string {
	switch {
	case !s.Done:
		return fmt.Sprintf("%s(%s) ...", s.Call, s.Arg)
	case s.Err != 0:
		return fmt.Sprintf("%s(%s) = %s", s.Call, s.Arg, errnoName(s.Err))
	}
	return fmt.Sprintf("%s(%s)", s.Call, s.Arg)
}

// StepsSpec is a program to run step by step.
type StepsSpec struct {
	Argv  []string
	Env   []string // the whole environment
	Stdin []byte
	Fault Fault
	// Observe names system calls that count as steps beside those that change
	// something: openat, read, newfstatat, fstat, statfs, fstatfs, getdents64,
	// socket, connect, getsockopt, setsockopt, recvfrom.
	Observe []string
	Timeout time.Duration // 0 = 1 min
}

// StepsResult is the outcome of a StepsSpec.
type StepsResult struct {
	Steps          []Step // in the order of their beginning
	Hit            bool   // the fault has happened: there were that many steps
	ExitCode       int    // -1 if a signal ended the process
	TimedOut       bool
	Stdout, Stderr []byte
	Elapsed        time.Duration
}

// stepCall tells of one system call whether it is a step, and what it is about.
type stepCall struct {
	name string
	// observe: it changes nothing, and is a step only where that is asked for.
	observe bool
	arg     func(t *tracee, args [6]uint64) (arg string, step bool)
}

// stepCalls are known by number. Those that newer architectures lack are not
// here (mkdir, open, rename …): Go and libc use their *at forms.
var stepCalls = map[uint64]stepCall{
	unix.SYS_BPF:        {name: "bpf", arg: argBPF},
	unix.SYS_OPENAT:     {name: "openat", arg: argPath(1)}, // without O_CREAT: to be observed
	unix.SYS_OPENAT2:    {name: "openat2", arg: argPath(1)},
	unix.SYS_WRITE:      {name: "write", arg: argFile},
	unix.SYS_PWRITE64:   {name: "pwrite64", arg: argFile},
	unix.SYS_FTRUNCATE:  {name: "ftruncate", arg: argFile},
	unix.SYS_FALLOCATE:  {name: "fallocate", arg: argFile},
	unix.SYS_FCHMOD:     {name: "fchmod", arg: argFile},
	unix.SYS_FCHOWN:     {name: "fchown", arg: argFile},
	unix.SYS_FLOCK:      {name: "flock", arg: argFile},
	unix.SYS_MKDIRAT:    {name: "mkdirat", arg: argPath(1)},
	unix.SYS_MKNODAT:    {name: "mknodat", arg: argPath(1)},
	unix.SYS_UNLINKAT:   {name: "unlinkat", arg: argPath(1)},
	unix.SYS_FCHMODAT:   {name: "fchmodat", arg: argPath(1)},
	unix.SYS_FCHOWNAT:   {name: "fchownat", arg: argPath(1)},
	unix.SYS_SYMLINKAT:  {name: "symlinkat", arg: argPath(2)},
	unix.SYS_LINKAT:     {name: "linkat", arg: argPath(1, 3)},
	unix.SYS_RENAMEAT:   {name: "renameat", arg: argPath(1, 3)},
	unix.SYS_RENAMEAT2:  {name: "renameat2", arg: argPath(1, 3)},
	unix.SYS_MOUNT:      {name: "mount", arg: argPath(0, 1)},
	unix.SYS_UMOUNT2:    {name: "umount2", arg: argPath(0)},
	unix.SYS_MOVE_MOUNT: {name: "move_mount", arg: argPath(1, 3)},
	unix.SYS_UNSHARE:    {name: "unshare", arg: argNothing},
	unix.SYS_SETNS:      {name: "setns", arg: argFile},
	unix.SYS_SENDTO:     {name: "sendto", arg: argSendto},
	unix.SYS_SENDMSG:    {name: "sendmsg", arg: argSendmsg},

	unix.SYS_READ:       {name: "read", arg: argFile, observe: true},
	unix.SYS_STATFS:     {name: "statfs", arg: argPath(0), observe: true},
	unix.SYS_FSTAT:      {name: "fstat", arg: argFile, observe: true},
	unix.SYS_FSTATFS:    {name: "fstatfs", arg: argFile, observe: true},
	unix.SYS_GETDENTS64: {name: "getdents64", arg: argFile, observe: true},
	unix.SYS_SOCKET:     {name: "socket", arg: argNothing, observe: true},
	unix.SYS_CONNECT:    {name: "connect", arg: argNothing, observe: true},
	unix.SYS_GETSOCKOPT: {name: "getsockopt", arg: argNothing, observe: true},
	unix.SYS_SETSOCKOPT: {name: "setsockopt", arg: argNothing, observe: true},
	unix.SYS_RECVFROM:   {name: "recvfrom", arg: argNothing, observe: true},
	sysFstatat:          {name: "newfstatat", arg: argPath(1), observe: true},
}

// registers says where an architecture keeps what a failing call needs: words
// of 8 bytes in sets that PTRACE_SETREGSET knows by number.
type registers struct{ numberSet, number, resultSet, result int }

// generalSet is NT_PRSTATUS.
const generalSet = 1

var architectures = map[string]registers{
	"amd64": {generalSet, 15, generalSet, 10}, // orig_rax, rax
	"arm64": {0x404, 0, generalSet, 0},        // NT_ARM_SYSTEM_CALL; x0
}

// sysFstatat is newfstatat, which x/sys names SYS_FSTATAT on arm64.
var sysFstatat = map[string]uint64{"amd64": 262, "arm64": 79}[runtime.GOARCH]

// NeedSteps skips the test where processes can't be run step by step.
func NeedSteps(t testing.TB) {
	t.Helper()
	if _, ok := architectures[runtime.GOARCH]; !ok {
		t.Skipf("SKIP-MISSING: the registers of %s are not known to the stepper", runtime.GOARCH)
	}
}

// RunSteps runs a program to its end under ptrace, all its threads, and has the
// fault happen to it. Children of the program are not followed. The error says
// that the program could not be run or traced.
//
// Steps of several threads are counted in the order in which they begin.
func RunSteps(spec StepsSpec) (r StepsResult, err error) {
	// A tracee belongs to the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	var stdout, stderr bytes.Buffer
	cmd := exec.Command(spec.Argv[0], spec.Argv[1:]...)
	cmd.Env = append([]string{}, spec.Env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(spec.Stdin), &stdout, &stderr
	// A group of its own, by which its threads are waited for, and nobody
	// else's children.
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true, Setpgid: true}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return r, fmt.Errorf("start %s: %w", spec.Argv[0], err)
	}
	t := &tracee{spec: &spec, pid: cmd.Process.Pid, known: map[int]bool{}, current: map[int]int{}, result: &r}
	limit := spec.Timeout
	if limit == 0 {
		limit = time.Minute
	}
	timer := time.AfterFunc(limit, t.timeOut)
	status, err := t.trace()
	timer.Stop()
	r.Elapsed = time.Since(start)
	r.ExitCode = status.ExitStatus()
	// It has been reaped: this ends the copying of its output only.
	_ = cmd.Wait()
	_ = cmd.Process.Release()
	r.Stdout, r.Stderr = stdout.Bytes(), stderr.Bytes()
	return r, err
}

// Steps runs the plugin step by step, with a fault; see [RunSteps] for observe.
func (c *CNI) Steps(t testing.TB, command string, p *Pod, fault Fault, observe []string, overrides ...Override) (CNIResult, StepsResult) {
	t.Helper()
	out, r, err := c.ExecSteps(command, p, fault, observe, overrides...)
	if err != nil {
		t.Fatalf("%s, %v: %v", command, fault, err)
	}
	return out, r
}

// ExecSteps is Steps for other goroutines than the test's. The error is not the
// plugin's, but that it could not be run or traced.
func (c *CNI) ExecSteps(command string, p *Pod, fault Fault, observe []string, overrides ...Override) (CNIResult, StepsResult, error) {
	i := c.invocation(command, p)
	for _, o := range overrides {
		o(i)
	}
	if i.Stdin == nil {
		var err error
		if i.Stdin, err = json.Marshal(i.Config); err != nil {
			return CNIResult{}, StepsResult{}, fmt.Errorf("write network configuration: %w", err)
		}
	}
	r, err := RunSteps(StepsSpec{
		Argv: []string{c.Plugin}, Env: i.environ(), Stdin: i.Stdin, Fault: fault, Observe: observe, Timeout: c.Timeout,
	})
	out := CNIResult{ExitCode: r.ExitCode, TimedOut: r.TimedOut, Stdout: r.Stdout, Stderr: r.Stderr, Elapsed: r.Elapsed}
	if out.ExitCode != 0 {
		out.Err = parseCNIError(out.Stdout)
	}
	return out, r, err
}

// tracee is a program under ptrace.
type tracee struct {
	spec    *StepsSpec
	pid     int
	known   map[int]bool // threads
	current map[int]int  // thread -> index of the step that it is in
	failing int          // the thread whose call is to fail
	result  *StepsResult

	mu    sync.Mutex
	ended bool
}

func (t *tracee) timeOut() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.ended {
		t.result.TimedOut = true
		_ = unix.Kill(t.pid, unix.SIGKILL)
	}
}

func (t *tracee) kill() { _ = unix.Kill(t.pid, unix.SIGKILL) }

// trace runs the program from its exec to its end.
func (t *tracee) trace() (status unix.WaitStatus, err error) {
	defer func() {
		t.mu.Lock()
		t.ended = true
		t.mu.Unlock()
		if err != nil {
			t.kill()
			for e := error(unix.EINTR); errors.Is(e, unix.EINTR); {
				_, e = unix.Wait4(t.pid, nil, unix.WALL, nil)
			}
		}
	}()
	if _, err := unix.Wait4(t.pid, &status, unix.WALL, nil); err != nil {
		return status, fmt.Errorf("wait for the program's exec: %w", err)
	}
	if !status.Stopped() {
		return status, fmt.Errorf("wait for the program's exec: it has ended, by status %#x", status)
	}
	t.known[t.pid] = true
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(t.pid, options); err != nil {
		return status, fmt.Errorf("set ptrace options: %w", err)
	}
	if err := t.resume(t.pid, 0); err != nil {
		return status, err
	}
	for {
		tid, err := unix.Wait4(-t.pid, &status, unix.WALL|unix.WNOTHREAD, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return status, fmt.Errorf("wait for the program: %w", err)
		case tid == t.pid && (status.Exited() || status.Signaled()):
			return status, nil
		case !status.Stopped():
			continue
		}
		var deliver syscall.Signal
		switch sig := status.StopSignal(); {
		case sig == unix.SIGTRAP|0x80:
			if err := t.stopped(tid); err != nil {
				return status, err
			}
		case sig == unix.SIGTRAP && status.TrapCause() > 0: // a new thread, or an exec
		case sig == unix.SIGSTOP && !t.known[tid]: // its first stop
		default:
			deliver = sig
		}
		t.known[tid] = true
		if err := t.resume(tid, deliver); err != nil {
			return status, err
		}
	}
}

// resume lets a thread go on to its next system call, or its return.
func (t *tracee) resume(tid int, sig syscall.Signal) error {
	err := unix.PtraceSyscall(tid, int(sig))
	if err != nil && !errors.Is(err, unix.ESRCH) { // killed meanwhile
		return fmt.Errorf("resume the program: %w", err)
	}
	return nil
}

// syscallInfo is struct ptrace_syscall_info (Linux 5.3): at the entry data has
// number and arguments, at the exit the result.
type syscallInfo struct {
	op     uint8
	_      [3]uint8
	arch   uint32
	ip, sp uint64
	data   [8]uint64
}

// stopped sees to a thread at the entry or the exit of a system call.
func (t *tracee) stopped(tid int) error {
	var info syscallInfo
	if err := ptrace(unix.PTRACE_GET_SYSCALL_INFO, tid, unsafe.Sizeof(info), unsafe.Pointer(&info)); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("get the program's system call (since Linux 5.3): %w", err)
	}
	fault := t.spec.Fault
	if info.op == unix.PTRACE_SYSCALL_INFO_ENTRY {
		step, ok := t.describe(info.data[0], [6]uint64(info.data[1:7]))
		if !ok {
			return nil
		}
		t.current[tid] = len(t.result.Steps)
		t.result.Steps = append(t.result.Steps, step)
		if len(t.result.Steps) != fault.Step {
			return nil
		}
		switch fault.Kind {
		case KillBefore:
			// A call whose caller is to die is not carried out.
			t.result.Hit = true
			t.kill()
		case FailCall:
			t.result.Hit = true
			t.failing = tid
			regs := architectures[runtime.GOARCH]
			return poke(tid, regs.numberSet, regs.number, -1)
		}
		return nil
	}
	at, ok := t.current[tid]
	if !ok {
		return nil
	}
	delete(t.current, tid)
	if t.failing == tid {
		t.failing = 0
		regs := architectures[runtime.GOARCH]
		info.data[0] = uint64(-int64(fault.Errno))
		if err := poke(tid, regs.resultSet, regs.result, -int64(fault.Errno)); err != nil {
			return err
		}
	} else if at+1 == fault.Step && fault.Kind == KillAfter {
		t.result.Hit = true
		t.kill()
		return nil
	}
	t.result.Steps[at].Done = true
	if n := int64(info.data[0]); n < 0 && n > -4096 {
		t.result.Steps[at].Err = unix.Errno(-n)
	}
	return nil
}

// describe says what a system call is, and whether it is a step.
func (t *tracee) describe(number uint64, args [6]uint64) (Step, bool) {
	call, ok := stepCalls[number]
	if !ok {
		return Step{}, false
	}
	observe := call.observe || number == unix.SYS_OPENAT && args[2]&unix.O_CREAT == 0
	if observe && !slices.Contains(t.spec.Observe, call.name) {
		return Step{}, false
	}
	arg, ok := call.arg(t, args)
	return Step{Call: call.name, Arg: arg}, ok
}

func argNothing(*tracee, [6]uint64) (string, bool) { return "", true }

// argPath takes the arguments at some indices for paths.
func argPath(indices ...int) func(*tracee, [6]uint64) (string, bool) {
	return func(t *tracee, args [6]uint64) (string, bool) {
		var paths []string
		for _, i := range indices {
			paths = append(paths, t.text(args[i]))
		}
		return strings.Join(paths, ", "), true
	}
}

// argFile takes the first argument for a descriptor. Those of files count, other
// than the standard ones, and netlink sockets, behind which is the kernel: pipes,
// other sockets and the runtime's own are nobody else's.
func argFile(t *tracee, args [6]uint64) (string, bool) {
	target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", t.pid, int32(args[0])))
	if err == nil && strings.HasPrefix(target, "socket:") {
		return "netlink", t.netlinkSocket(int(args[0]))
	}
	file := strings.HasPrefix(target, "/") || strings.HasPrefix(target, "net:")
	return target, err == nil && args[0] > 2 && file && !strings.HasPrefix(target, "/dev/")
}

func argSendto(t *tracee, args [6]uint64) (string, bool) { return "netlink", t.netlink(args[4]) }

func argSendmsg(t *tracee, args [6]uint64) (string, bool) {
	var name uint64 // msg_name is the first member of struct msghdr
	return "netlink", t.read(args[1], bytesOf(&name)) == 8 && t.netlink(name)
}

// netlink says whether a socket address is of AF_NETLINK.
func (t *tracee) netlink(addr uint64) bool {
	var family uint16
	return addr != 0 && t.read(addr, bytesOf(&family)) == 2 && family == unix.AF_NETLINK
}

// netlinkSocket says whether a socket is of AF_NETLINK, by its descriptor.
func (t *tracee) netlinkSocket(fd int) bool {
	pidfd, err := unix.PidfdOpen(t.pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(pidfd)
	same, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return false
	}
	defer unix.Close(same)
	domain, err := unix.GetsockoptInt(same, unix.SOL_SOCKET, unix.SO_DOMAIN)
	return err == nil && domain == unix.AF_NETLINK
}

// bpfCommands are the names of enum bpf_cmd, in its order.
var bpfCommands = strings.Fields(`MAP_CREATE MAP_LOOKUP_ELEM MAP_UPDATE_ELEM MAP_DELETE_ELEM MAP_GET_NEXT_KEY PROG_LOAD
	OBJ_PIN OBJ_GET PROG_ATTACH PROG_DETACH PROG_TEST_RUN PROG_GET_NEXT_ID MAP_GET_NEXT_ID PROG_GET_FD_BY_ID
	MAP_GET_FD_BY_ID OBJ_GET_INFO_BY_FD PROG_QUERY RAW_TRACEPOINT_OPEN BTF_LOAD BTF_GET_FD_BY_ID TASK_FD_QUERY
	MAP_LOOKUP_AND_DELETE_ELEM MAP_FREEZE BTF_GET_NEXT_ID MAP_LOOKUP_BATCH MAP_LOOKUP_AND_DELETE_BATCH MAP_UPDATE_BATCH
	MAP_DELETE_BATCH LINK_CREATE LINK_UPDATE LINK_GET_FD_BY_ID LINK_GET_NEXT_ID ENABLE_STATS ITER_CREATE LINK_DETACH
	PROG_BIND_MAP TOKEN_CREATE PROG_STREAM_READ_BY_FD`)

func argBPF(t *tracee, args [6]uint64) (string, bool) {
	if args[0] >= uint64(len(bpfCommands)) {
		return fmt.Sprint(args[0]), true
	}
	name := bpfCommands[args[0]]
	if args[0] == unix.BPF_OBJ_PIN || args[0] == unix.BPF_OBJ_GET {
		var path uint64 // the first member of the attributes
		if t.read(args[1], bytesOf(&path)) == 8 {
			name += " " + t.text(path)
		}
	}
	return name, true
}

// text reads a string of the program's, of 256 bytes at most.
func (t *tracee) text(addr uint64) string {
	buf := make([]byte, 256)
	n := 0
	// One page at a time: the next may not be there.
	for n < len(buf) && !bytes.Contains(buf[:n], []byte{0}) {
		end := min(len(buf), n+4096-int((addr+uint64(n))%4096))
		got := t.read(addr+uint64(n), buf[n:end])
		if n += got; got == 0 {
			break
		}
	}
	s, _, _ := bytes.Cut(buf[:n], []byte{0})
	return string(s)
}

// read reads the program's memory, and gives how much it got.
func (t *tracee) read(addr uint64, into []byte) int {
	local := []unix.Iovec{{Base: unsafe.SliceData(into), Len: uint64(len(into))}}
	remote := []unix.RemoteIovec{{Base: uintptr(addr), Len: len(into)}}
	n, err := unix.ProcessVMReadv(t.pid, local, remote, 0)
	if err != nil {
		return 0
	}
	return n
}

func bytesOf[T uint16 | uint64](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

// poke changes a register of a thread.
func poke(tid, set, word int, value int64) error {
	var regs [64]int64
	iov := unix.Iovec{Base: (*byte)(unsafe.Pointer(&regs)), Len: uint64(unsafe.Sizeof(regs))}
	// The kernel says in iov how large the set is.
	if err := ptrace(unix.PTRACE_GETREGSET, tid, uintptr(set), unsafe.Pointer(&iov)); err != nil {
		return fmt.Errorf("get the program's registers: %w", err)
	}
	regs[word] = value
	if err := ptrace(unix.PTRACE_SETREGSET, tid, uintptr(set), unsafe.Pointer(&iov)); err != nil {
		return fmt.Errorf("set the program's registers: %w", err)
	}
	return nil
}

func ptrace(request, tid int, addr uintptr, data unsafe.Pointer) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, uintptr(data), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
