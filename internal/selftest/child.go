// SPDX-License-Identifier: Apache-2.0

package selftest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The roles of a child.
const (
	roleServe = "serve" // UID, whether there is IPv6, NAME=PORT …
	roleMPTCP = "mptcp"
)

// dialTimeout is how long a connection may take, from the first packet to the
// answer.
const dialTimeout = 2 * time.Second

var errUsage = errors.New("this command is the self-test's own")

// Child is what a process of the self-test does: it ends when stdin does.
func Child(args []string, stdin io.Reader, stdout io.Writer) error {
	say := func(a answer) error { return json.NewEncoder(stdout).Encode(a) }
	switch {
	case len(args) == 1 && args[0] == roleMPTCP:
		return say(listenMPTCP())
	case len(args) < 3 || args[0] != roleServe:
		return errUsage
	}
	uid, err := strconv.ParseUint(args[1], 10, 31)
	if err != nil {
		return errUsage
	}
	if err := become(int(uid)); err != nil {
		return say(answer{Error: fmt.Sprintf("become uid %d: %v", uid, err)})
	}
	networks := []string{"tcp4"}
	if args[2] == "true" {
		networks = append(networks, "tcp6")
	}
	for _, arg := range args[3:] {
		name, port, _ := strings.Cut(arg, "=")
		for _, network := range networks {
			if err := serve(network, name, port); err != nil {
				return say(answer{Error: fmt.Sprintf("listen: %v", err)})
			}
		}
	}
	if err := say(answer{}); err != nil {
		return err
	}
	for lines := bufio.NewScanner(stdin); lines.Scan(); {
		to, err := netip.ParseAddrPort(lines.Text())
		if err != nil {
			return err
		}
		if err := say(dial(to)); err != nil {
			return err
		}
	}
	return nil
}

// become gives up root's ids, of all threads: the process started as root
// because its executable may be readable by root alone.
func become(id int) error {
	if id == 0 {
		return nil
	}
	return errors.Join(syscall.Setgroups(nil), syscall.Setresgid(id, id, id), syscall.Setresuid(id, id, id))
}

// serve tells each client, as an answer, what its connection looks like here.
func serve(network, name, port string) error {
	var conf net.ListenConfig
	conf.SetMultipathTCP(false) // whether that works is another question
	l, err := conf.Listen(context.Background(), network, ":"+port)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			a := answer{Listener: name, Original: original(c.(*net.TCPConn)).String()} //nolint:forcetypeassert // a TCP listener's
			if peer, err := netip.ParseAddrPort(c.RemoteAddr().String()); err == nil {
				a.Peer = peer.Addr().Unmap().String()
			}
			_ = c.SetWriteDeadline(time.Now().Add(dialTimeout))
			_ = json.NewEncoder(c).Encode(a) // the client says what it has got
			c.Close()
		}
	}()
	return nil
}

// An originalDst is what SO_ORIGINAL_DST answers.
type originalDst struct {
	addr netip.AddrPort
	err  error
}

func (o originalDst) String() string {
	if o.err != nil {
		return fmt.Sprintf("unknown (%v)", o.err)
	}
	return o.addr.String()
}

// original asks for the original destination at the level of the socket's
// family.
func original(c *net.TCPConn) (o originalDst) {
	raw, err := c.SyscallConn()
	if err != nil {
		return originalDst{err: err}
	}
	local, err := netip.ParseAddrPort(c.LocalAddr().String())
	if err != nil {
		return originalDst{err: err}
	}
	err = raw.Control(func(fd uintptr) {
		if local.Addr().Is4() {
			// The first 16 of these 20 bytes are a sockaddr_in.
			v, err := unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST)
			if err != nil {
				o.err = err
				return
			}
			b := v.Multiaddr
			o.addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
			return
		}
		v, err := unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, unix.SO_ORIGINAL_DST)
		if err != nil {
			o.err = err
			return
		}
		port := (*[2]byte)(unsafe.Pointer(&v.Addr.Port)) // in network byte order
		o.addr = netip.AddrPortFrom(netip.AddrFrom16(v.Addr.Addr), uint16(port[0])<<8|uint16(port[1]))
	})
	if err != nil {
		o.err = err
	}
	return o
}

// dial connects, and gives what both ends say of the connection.
func dial(to netip.AddrPort) (a answer) {
	d := net.Dialer{Timeout: dialTimeout}
	c, err := d.DialContext(context.Background(), "tcp", to.String())
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return answer{Refused: true}
	case err != nil:
		return answer{Error: err.Error()}
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(dialTimeout))
	if err := json.NewDecoder(c).Decode(&a); err != nil {
		return answer{Error: fmt.Sprintf("connected, but nobody answers: %v", err)}
	}
	a.Remote = c.RemoteAddr().String()
	return a
}

// listenMPTCP listens by MPTCP at some port; refused says that there is none.
func listenMPTCP() answer {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ENOPROTOOPT) || errors.Is(err, unix.EINVAL) {
		return answer{Refused: true}
	}
	if err != nil {
		return answer{Error: err.Error()}
	}
	defer unix.Close(s)
	if err := unix.Listen(s, 1); err != nil {
		return answer{Error: err.Error()}
	}
	return answer{}
}
