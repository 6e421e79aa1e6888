// SPDX-License-Identifier: Apache-2.0

package validate

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// hopLimit of what is sent: a connection that is redirected stays in the pod,
	// one that is not ends at the node.
	hopLimit = 1
	// attempt bounds one connection. A SYN is not repeated within it.
	attempt = 900 * time.Millisecond
	// pause lies between two attempts that were answered at once.
	pause = 100 * time.Millisecond

	soOriginalDst = 80 // SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST
	tokenLen      = 16
)

// A Missing is a check that has failed.
type Missing struct {
	Check
	Err error
}

// A CantListenError says that a check can't be made because the proxy's port is
// not to be had.
type CantListenError struct {
	At  netip.AddrPort
	Err error
}

func (e *CantListenError) Error() string {
	text := fmt.Sprintf("listen at %v, in the proxy's place: %v", e.At, e.Err)
	if errors.Is(e.Err, syscall.EADDRINUSE) {
		text += ": is the proxy running already?"
	}
	return text
}

func (e *CantListenError) Unwrap() error { return e.Err }

// Addrs are the pod's own addresses that the mesh knows: no loopback, no
// link-local ones, not ::6, from which the proxy talks to its app.
func Addrs() ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the pod's addresses: %w", err)
	}
	var own []netip.Addr
	for _, x := range all {
		p, err := netip.ParsePrefix(x.String())
		a := p.Addr().Unmap()
		if err == nil && !a.IsLoopback() && !a.IsLinkLocalUnicast() && a != netip.MustParseAddr("::6") {
			own = append(own, a)
		}
	}
	return own, nil
}

// Run makes each check's connection, again and again until it is redirected or
// ctx ends, and says which never were. It fails where it can't listen in the
// proxy's place.
func Run(ctx context.Context, checks []Check) (missing []Missing, err error) {
	catchers := map[netip.AddrPort]*catcher{}
	defer func() {
		for _, c := range catchers {
			c.close()
		}
	}()
	for _, c := range checks {
		if catchers[c.At] != nil {
			continue
		}
		if catchers[c.At], err = listen(ctx, c.At); err != nil {
			delete(catchers, c.At)
			return nil, &CantListenError{c.At, err}
		}
	}
	errs := make([]error, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() { errs[i] = c.run(ctx, catchers[c.At]) })
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			missing = append(missing, Missing{checks[i], err})
		}
	}
	return missing, nil
}

// run repeats a check until it is met.
func (c Check) run(ctx context.Context, at *catcher) error {
	for {
		err := c.once(ctx, at)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// once makes one connection and waits for it at the listener.
func (c Check) once(ctx context.Context, at *catcher) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), attempt)
	defer cancel()
	var token [tokenLen]byte
	_, _ = rand.Read(token[:]) // never fails, by its documentation
	arrived := at.expect(token)
	defer at.forget(token)
	d := net.Dialer{ControlContext: func(_ context.Context, _, _ string, conn syscall.RawConn) error {
		return c.limit(conn)
	}}
	conn, err := d.DialContext(ctx, "tcp", c.To.String())
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		if ctx.Err() != nil {
			err = errors.New("nothing answers")
		}
		return err
	}
	defer conn.Close()
	if _, err := conn.Write(token[:]); err != nil {
		return fmt.Errorf("it is answered by another than %v, and ends: %w", c.At, err)
	}
	select {
	case <-ctx.Done():
		return fmt.Errorf("it is answered by another than %v", c.At)
	case got := <-arrived:
		switch {
		case got.err != nil:
			return fmt.Errorf("it arrives at %v, but the original destination can't be had: %w", c.At, got.err)
		case got.dst != c.To:
			return fmt.Errorf("it arrives at %v with the original destination %v", c.At, got.dst)
		}
		return nil
	}
}

// limit sets the hop limit of a socket.
func (c Check) limit(conn syscall.RawConn) (err error) {
	level, option := unix.IPPROTO_IP, unix.IP_TTL
	if c.To.Addr().Is6() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS
	}
	err2 := conn.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, hopLimit) })
	return errors.Join(err, err2)
}

// A catcher is a listener in the proxy's place. Connections are told apart by
// what they say first.
type catcher struct {
	l    net.Listener
	done sync.WaitGroup
	dst  func(conn net.Conn) (netip.AddrPort, error) // originalDst

	mu      sync.Mutex
	waiting map[[tokenLen]byte]chan arrival
}

// An arrival is what an accepted socket knows.
type arrival struct {
	dst netip.AddrPort
	err error
}

func listen(ctx context.Context, at netip.AddrPort) (*catcher, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(ctx, "tcp", at.String())
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		return nil, err
	}
	c := &catcher{l: l, dst: originalDst, waiting: map[[tokenLen]byte]chan arrival{}}
	c.done.Go(c.serve)
	return c, nil
}

func (c *catcher) close() {
	_ = c.l.Close() // nothing was written
	c.done.Wait()
}

func (c *catcher) expect(token [tokenLen]byte) <-chan arrival {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch := make(chan arrival, 1)
	c.waiting[token] = ch
	return ch
}

func (c *catcher) forget(token [tokenLen]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, token)
}

func (c *catcher) serve() {
	for {
		conn, err := c.l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // ended before it was accepted
		}
		c.done.Go(func() { c.one(conn) })
	}
}

func (c *catcher) one(conn net.Conn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(attempt)) // fails once it is closed
	var token [tokenLen]byte
	if _, err := io.ReadFull(conn, token[:]); err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var a arrival
	a.dst, a.err = c.dst(conn)
	if ch := c.waiting[token]; ch != nil {
		ch <- a
		delete(c.waiting, token)
	}
}

// originalDst asks a socket as proxies do.
func originalDst(conn net.Conn) (dst netip.AddrPort, err error) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return dst, fmt.Errorf("it is a %T", conn)
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return dst, err
	}
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return dst, err
	}
	err2 := raw.Control(func(fd uintptr) {
		if local.Addr().Unmap().Is4() {
			var sa *unix.IPv6Mreq // large enough for a sockaddr_in, in network byte order
			if sa, err = unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, soOriginalDst); err == nil {
				b := sa.Multiaddr
				dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4]))
			}
			return
		}
		var sa *unix.IPv6MTUInfo // begins with a sockaddr_in6
		if sa, err = unix.GetsockoptIPv6MTUInfo(int(fd), unix.IPPROTO_IPV6, soOriginalDst); err == nil {
			port := make([]byte, 2)
			binary.NativeEndian.PutUint16(port, sa.Addr.Port)
			dst = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr.Addr), binary.BigEndian.Uint16(port))
		}
	})
	return dst, errors.Join(err, err2)
}

// Text says in one line what is missing.
func Text(missing []Missing) string {
	var texts []string
	for _, m := range missing {
		if t := fmt.Sprintf("%v: %v", m.Check, m.Err); !slices.Contains(texts, t) {
			texts = append(texts, t)
		}
	}
	return strings.Join(texts, "; ")
}
