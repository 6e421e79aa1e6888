// SPDX-License-Identifier: Apache-2.0

package realproxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

const asGoProxy = "SHUNT_REALPROXY_AS_GO_PROXY"

func init() {
	if os.Getenv(asGoProxy) == "" {
		return
	}
	fmt.Fprintln(os.Stderr, goProxy())
	os.Exit(1)
}

// goProxy is a proxy as Go programs are written: by net.Listen, which gives
// listeners of MPTCP where the kernel has it, and of both families.
func goProxy() error {
	failed := make(chan error)
	for port, source := range map[int]net.Addr{testbed.OutboundPort: nil, testbed.InboundPort: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 6)}} {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failed <- err
					return
				}
				go func() {
					if err := relay(c.(*net.TCPConn), source); err != nil {
						fmt.Fprintln(os.Stderr, err)
					}
				}()
			}
		}()
	}
	return <-failed
}

// relay hands a connection on to where its client wanted to go.
func relay(c *net.TCPConn, source net.Addr) error {
	defer c.Close()
	dst, err := originalDst(c)
	if err != nil {
		return fmt.Errorf("SO_ORIGINAL_DST: %w", err)
	}
	d := net.Dialer{LocalAddr: source}
	out, err := d.Dial("tcp4", dst.String())
	if err != nil {
		return err
	}
	defer out.Close()
	go func() {
		_, _ = io.Copy(out, c) // the end of either is the end of both
		out.Close()
	}()
	_, _ = io.Copy(c, out) // as above
	return nil
}

func originalDst(c *net.TCPConn) (dst netip.AddrPort, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return dst, err
	}
	var sa unix.RawSockaddrInet4
	size := uint32(unsafe.Sizeof(sa))
	var errno syscall.Errno
	err = raw.Control(func(fd uintptr) {
		const soOriginalDst = 80
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_IP, soOriginalDst, uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)), 0)
	})
	if err != nil {
		return dst, err
	}
	if errno != 0 {
		return dst, errno
	}
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:])
	return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), port), nil
}

// TestPrivilegedGoProxy: listeners of MPTCP take inbound connections by TC and by
// iptables. sk_lookup can't have them: see TestPrivilegedMPTCPListener of
// redirect/ebpf.
func TestPrivilegedGoProxy(t *testing.T) { eachPath(t, testGoProxy, tc, iptables) }

func testGoProxy(t *testing.T, on path) {
	b := newBed(t, on)
	// A copy where the proxy's user may read it.
	dir := t.TempDir()
	exe := filepath.Join(dir, "proxy")
	self, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = errors.Join(os.WriteFile(exe, self, 0o755), os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, 0o755)) //nolint:gosec // a program
	}
	if err != nil {
		t.Fatal(err)
	}
	p := b.startUntil(t, testbed.ProcessSpec{Argv: []string{exe}, Env: []string{asGoProxy + "=1"}}, testbed.OutboundPort, testbed.InboundPort)
	for _, s := range destinations {
		relayed(t, b.app.Actor, netip.MustParseAddrPort(s), "world")
	}
	for _, port := range appPorts {
		served := relayed(t, b.World.Actor, netip.AddrPortFrom(b.Addr4(), port), "app")
		if got := served.Peer.Addr().Unmap().String(); got != "127.0.0.6" {
			t.Errorf("the app sees %s", got)
		}
	}
	if t.Failed() {
		t.Logf("the proxy says:\n%s", p.Output())
	}
}
