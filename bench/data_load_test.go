// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

// The data path is measured by processes of this test binary inside of the
// pods: one in the part of the app, one in the part of the proxy. Each is told
// over its standard input, a socket, to do one thing many times, and answers
// how long that took. In between it makes bare system calls, on a thread that
// is bound to one processor: all processes to the same one, so that what is
// measured is the work of both ends and of the kernel between them (the
// loopback device and veth hand packets over in the sender's own context),
// and not which processor the scheduler chose, or how long that took to wake.
//
// Connections are ended by a reset, SO_LINGER with 0 seconds: they leave no
// TIME_WAIT, whose number would make each round slower than the last, and ports
// don't run out. It is so on every path.

// asLoad makes the test binary such a process; its value is the processor.
const asLoad = "SHUNT_BENCH_AS_LOAD"

// Before TestMain, and before any test: see testbed's actors.
func init() {
	cpu, ok := os.LookupEnv(asLoad)
	if !ok {
		return
	}
	if err := loadMain(cpu); err != nil {
		fmt.Fprintln(os.Stderr, "bench: load:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// The things that a load process does.
const (
	opListen   = "listen"   // on Port, at the wildcard of both families
	opReset    = "reset"    // accept N connections, and reset each at once
	opAnswer   = "answer"   // accept one; whenever Every bytes have come, send one
	opAsk      = "ask"      // accept one, ask N times for its original destination, send a byte
	opConnect  = "connect"  // connect N sockets to Dst; then reset them all
	opAwait    = "await"    // connect N times to Dst, each time wait for the reset
	opConverse = "converse" // connect, and N times: write Writes times Size bytes, read one
)

// An order is what a load process is to do.
type order struct {
	Op     string
	Port   int
	Dst    netip.AddrPort
	Spread bool // connect, await: to 250 addresses, Dst with other last bytes
	N      int
	Every  int
	Writes int
	Size   int
}

// A report is what came of it.
type report struct {
	Err     string
	Took    time.Duration  // of the whole; for connect, of the connects alone
	CPU     time.Duration  // of this process's thread, the kernel's work in it included
	Dst     netip.AddrPort // ask: what the connection says
	Packets int            // answer: how many packets with data have come
}

// load is the process's own state.
type load struct {
	listeners map[int]int // by port
	socks     []int
	buf       []byte
}

func loadMain(cpu string) error {
	var n int
	if _, err := fmt.Sscan(cpu, &n); err != nil {
		return fmt.Errorf("%s=%s: %w", asLoad, cpu, err)
	}
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(n)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("bind to processor %d: %w", n, err)
	}
	debug.SetGCPercent(-1)
	l := load{listeners: map[int]int{}, buf: make([]byte, 1<<20)}
	// Neither is used while something is measured.
	ctl := os.NewFile(0, "control")
	in, out := json.NewDecoder(ctl), json.NewEncoder(ctl)
	for {
		var o order
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read order: %w", err)
		}
		var r report
		cpu, start := threadCPU(), time.Now()
		err := l.do(o, &r)
		if r.Took == 0 {
			r.Took, r.CPU = time.Since(start), threadCPU()-cpu
		}
		if err != nil {
			r.Err = fmt.Sprintf("%s: %v", o.Op, err)
		}
		if err := out.Encode(r); err != nil {
			return fmt.Errorf("report: %w", err)
		}
	}
}

func threadCPU() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		panic(err) // can't be
	}
	return time.Duration(ts.Nano())
}

func (l *load) do(o order, r *report) error {
	switch o.Op {
	case opListen:
		return l.listen(o.Port)
	case opReset:
		return o.times(r, func(int) error {
			fd, err := l.accept(o.Port)
			closeFD(fd)
			return err
		})
	case opAnswer:
		return l.answer(o, r)
	case opAsk:
		return l.ask(o, r)
	case opConnect:
		return l.connect(o, r)
	case opAwait:
		return l.await(o, r)
	case opConverse:
		return l.converse(o, r)
	}
	return fmt.Errorf("no such operation")
}

// times does one N/8 times first, for the caches, and then N times, which is
// measured.
func (o order) times(r *report, one func(i int) error) error {
	warm := o.N / 8
	var cpu time.Duration
	var start time.Time
	for i := range warm + o.N {
		if i == warm {
			cpu, start = threadCPU(), time.Now()
		}
		if err := one(i); err != nil {
			return err
		}
	}
	r.Took, r.CPU = time.Since(start), threadCPU()-cpu
	return nil
}

func (l *load) listen(port int) error {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	l.listeners[port] = fd
	for _, o := range [][3]int{
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
		{unix.SOL_IPV6, unix.IPV6_V6ONLY, 0},
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}, // it and SO_LINGER are inherited
	} {
		if err := unix.SetsockoptInt(fd, o[0], o[1], o[2]); err != nil {
			return err
		}
	}
	if err := resetOnClose(fd); err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet6{Port: port}); err != nil {
		return fmt.Errorf("bind to port %d: %w", port, err)
	}
	return unix.Listen(fd, 4096)
}

func resetOnClose(fd int) error {
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// The calls that are measured go past the Go scheduler, which has nothing else
// to run here.

func raw(trap, a, b, c uintptr) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(trap, a, b, c)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return -1, errno
		}
	}
}

func closeFD(fd int) { _, _ = raw(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

func (l *load) accept(port int) (int, error) {
	return raw(unix.SYS_ACCEPT, uintptr(l.listeners[port]), 0, 0)
}

func (l *load) read(fd, most int) (int, error) {
	return raw(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&l.buf[0])), uintptr(most))
}

func (l *load) write(fd, size int) error {
	for size > 0 {
		n, err := raw(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&l.buf[0])), uintptr(size))
		if err != nil {
			return err
		}
		size -= n
	}
	return nil
}

// A peer is an address to connect to.
type peer struct {
	domain int
	raw    []byte
}

func peerOf(dst netip.AddrPort) peer {
	a := dst.Addr()
	if a.Is4() {
		b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET)
		b = binary.BigEndian.AppendUint16(b, dst.Port())
		b = append(b, a.AsSlice()...)
		return peer{unix.AF_INET, append(b, make([]byte, unix.SizeofSockaddrInet4-len(b))...)}
	}
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = append(b, 0, 0, 0, 0)
	b = append(b, a.AsSlice()...)
	return peer{unix.AF_INET6, append(b, make([]byte, unix.SizeofSockaddrInet6-len(b))...)}
}

func (p peer) socket() (int, error) {
	return raw(unix.SYS_SOCKET, uintptr(p.domain), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
}

func (p peer) connect(fd int) error {
	_, err := raw(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&p.raw[0])), uintptr(len(p.raw)))
	return err
}

// turn goes on to the i-th of the addresses to connect to, if they are several.
// Connection tracking knows an ended connection for seconds, and what it has
// decided for it: the same client port must not come again with the same address.
func (p peer) turn(o order, i int) {
	if o.Spread {
		last := unix.SizeofSockaddrInet4 - 9 // of the address
		if p.domain == unix.AF_INET6 {
			last = unix.SizeofSockaddrInet6 - 5
		}
		p.raw[last] = byte(1 + i%250)
	}
}

// connect finds how long connect itself takes. Nobody accepts meanwhile: on
// loopback a handshake needs nobody.
func (l *load) connect(o order, r *report) error {
	to := peerOf(o.Dst)
	l.socks = l.socks[:0]
	defer func() {
		for _, fd := range l.socks {
			closeFD(fd)
		}
	}()
	for range o.N + o.N/8 {
		fd, err := to.socket()
		if err != nil {
			return err
		}
		l.socks = append(l.socks, fd)
		if err := resetOnClose(fd); err != nil {
			return err
		}
	}
	return o.times(r, func(i int) error {
		to.turn(o, i)
		return to.connect(l.socks[i])
	})
}

func (l *load) await(o order, r *report) error {
	to := peerOf(o.Dst)
	return o.times(r, func(i int) error {
		fd, err := to.socket()
		if err != nil {
			return err
		}
		to.turn(o, i)
		if err := to.connect(fd); err != nil {
			return err
		}
		if n, err := l.read(fd, 1); !errors.Is(err, unix.ECONNRESET) {
			return errors.Join(fmt.Errorf("no reset comes, but %d bytes", n), err)
		}
		closeFD(fd)
		return nil
	})
}

func (l *load) converse(o order, r *report) error {
	to := peerOf(o.Dst)
	fd, err := to.socket()
	if err != nil {
		return err
	}
	defer closeFD(fd)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return err
	}
	if err := resetOnClose(fd); err != nil {
		return err
	}
	if err := to.connect(fd); err != nil {
		return err
	}
	return o.times(r, func(int) error {
		for range o.Writes {
			if err := l.write(fd, o.Size); err != nil {
				return err
			}
		}
		if n, err := l.read(fd, 1); n != 1 {
			return errors.Join(fmt.Errorf("no answer comes, but %d bytes", n), err)
		}
		return nil
	})
}

func (l *load) answer(o order, r *report) error {
	fd, err := l.accept(o.Port)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	for got := 0; ; {
		n, err := l.read(fd, min(o.Every-got, len(l.buf)))
		if err == nil && n > 0 {
			if got += n; got == o.Every {
				got = 0
				err = l.write(fd, 1)
			}
		}
		if errors.Is(err, unix.ECONNRESET) {
			break
		}
		if err != nil || n == 0 {
			return errors.Join(fmt.Errorf("no reset comes, but %d bytes", n), err)
		}
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return err
	}
	r.Packets = int(info.Data_segs_in)
	return nil
}

// ask is what a proxy does with every connection: SO_ORIGINAL_DST. Where nothing
// has redirected it the answer is ENOENT, and costs something too.
func (l *load) ask(o order, r *report) error {
	fd, err := l.accept(o.Port)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	const soOriginalDst = 80
	level := uintptr(unix.SOL_IP)
	if sa, err := unix.Getsockname(fd); err != nil {
		return err
	} else if sa, ok := sa.(*unix.SockaddrInet6); ok && !netip.AddrFrom16(sa.Addr).Is4In6() {
		level = unix.SOL_IPV6
	}
	var answer [unix.SizeofSockaddrInet6]byte
	var size uint32
	var errno unix.Errno
	cpu, start := threadCPU(), time.Now()
	for range o.N {
		size = uint32(len(answer))
		_, _, errno = unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), level, soOriginalDst,
			uintptr(unsafe.Pointer(&answer[0])), uintptr(unsafe.Pointer(&size)), 0)
	}
	r.Took, r.CPU = time.Since(start), threadCPU()-cpu
	if err := l.write(fd, 1); err != nil {
		return err
	}
	switch {
	case errno == unix.ENOENT || errno == unix.ENOPROTOOPT:
		return nil
	case errno != 0:
		return errno
	}
	port := binary.BigEndian.Uint16(answer[2:])
	if level == unix.SOL_IP {
		r.Dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(answer[4:8])), port)
	} else {
		r.Dst = netip.AddrPortFrom(netip.AddrFrom16([16]byte(answer[8:24])), port)
	}
	return nil
}

// ------------------------------------------------- the benchmark's side of it

// A worker is a load process, as the benchmark has it.
type worker struct {
	name string
	ctl  *os.File
	in   *json.Decoder
	out  *json.Encoder
}

// lastCPU is the processor that all of them have.
func lastCPU(tb testing.TB) string {
	tb.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		tb.Fatalf("get the processors: %v", err)
	}
	last := -1
	for i := range 1024 {
		if set.IsSet(i) {
			last = i
		}
	}
	return fmt.Sprint(last)
}

func loadEnv(tb testing.TB) []string {
	// No signals between goroutines, no second thread that runs any.
	return []string{asLoad + "=" + lastCPU(tb), "GODEBUG=asyncpreemptoff=1", "GOMAXPROCS=1"}
}

// startLoad starts one by start, which is given its standard input.
func startLoad(tb testing.TB, name string, start func(stdin *os.File)) *worker {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatalf("create socket pair: %v", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil { // ours, so that it has deadlines
		tb.Fatal(err)
	}
	l := &worker{name: name, ctl: os.NewFile(uintptr(fds[0]), "control of "+name)}
	l.in, l.out = json.NewDecoder(l.ctl), json.NewEncoder(l.ctl)
	theirs := os.NewFile(uintptr(fds[1]), "theirs")
	defer theirs.Close()
	start(theirs)
	return l
}

// loadIn starts one in a pod.
func loadIn(tb testing.TB, p *testbed.Pod, container string, uid, gid int) *worker {
	tb.Helper()
	name := p.Name + "/" + container
	l := startLoad(tb, name, func(stdin *os.File) {
		p.Start(tb, testbed.ProcessSpec{Argv: []string{"/proc/self/exe"}, Env: loadEnv(tb), UID: uid, GID: gid, Container: container, Stdin: stdin})
	})
	tb.Cleanup(func() { l.ctl.Close() }) // it ends by that, before it would be killed
	return l
}

// loadOutside starts one in the world.
func loadOutside(tb testing.TB, w *testbed.World) *worker {
	tb.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env, cmd.Stderr = loadEnv(tb), os.Stderr
	l := startLoad(tb, "world", func(stdin *os.File) {
		cmd.Stdin = stdin
		if err := w.Do(cmd.Start); err != nil {
			tb.Fatalf("start a process in the world: %v", err)
		}
	})
	tb.Cleanup(func() {
		l.ctl.Close()
		kill := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Signal(syscall.SIGKILL) })
		defer kill.Stop()
		if err := cmd.Wait(); err != nil {
			tb.Errorf("the world's process: %v", err)
		}
	})
	return l
}

// order has it begin; report waits for the end.
func (l *worker) order(tb testing.TB, o order) {
	tb.Helper()
	if err := l.out.Encode(o); err != nil {
		tb.Fatalf("%s: %s: %v", l.name, o.Op, err)
	}
}

func (l *worker) report(tb testing.TB) (r report) {
	tb.Helper()
	if err := l.ctl.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		tb.Fatal(err)
	}
	if err := l.in.Decode(&r); err != nil {
		tb.Fatalf("%s: %v", l.name, err)
	}
	if r.Err != "" {
		tb.Fatalf("%s: %s", l.name, r.Err)
	}
	return r
}

func (l *worker) do(tb testing.TB, o order) report {
	tb.Helper()
	l.order(tb, o)
	return l.report(tb)
}
