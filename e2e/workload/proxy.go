// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/e2e/wire"
)

type sidecar struct {
	transparent bool // as a pod in TPROXY mode wants its proxy
	mu          sync.Mutex
	inbound     []wire.Inbound
}

type originalKey struct{}

// proxy answers what its pod dials and what its pod asks of nameservers, and
// passes on what its pod is dialled for: from the source address that tells the
// redirection to leave it alone or, if it is transparent, from the client's.
func proxy(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("proxy", flag.ContinueOnError)
	p := &sidecar{}
	flags.BoolVar(&p.transparent, "transparent", false, "be as TPROXY mode wants a proxy; needs CAP_NET_ADMIN")
	// Injected proxies are called "proxy sidecar ...".
	if err := flags.Parse(args[min(1, len(args)):]); err != nil {
		return err
	}
	failed := make(chan error, 5)
	outbound := func(w http.ResponseWriter, r *http.Request) {
		a := answerTo("proxy", r)
		a.OriginalDst, _ = r.Context().Value(originalKey{}).(string)
		reply(w, a)
	}
	keep := func(ctx context.Context, c net.Conn) context.Context {
		dst, err := originalDst(c)
		if err != nil {
			return context.WithValue(ctx, originalKey{}, "error: "+err.Error())
		}
		return context.WithValue(ctx, originalKey{}, dst.String())
	}
	go func() { failed <- serve(ctx, ":15001", http.HandlerFunc(outbound), keep) }()
	go func() { failed <- p.passOn(ctx, ":15006") }()
	for _, host := range []string{"127.0.0.1", "::1"} {
		go func() {
			failed <- wire.ServeDNS(ctx, net.JoinHostPort(host, strconv.Itoa(wire.DNSPort)), wire.ProxyAddrs)
		}()
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/inbound", func(w http.ResponseWriter, _ *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		reply(w, p.inbound)
	})
	mux.HandleFunc("/healthz", func(http.ResponseWriter, *http.Request) {})
	go func() { failed <- serve(ctx, ":"+strconv.Itoa(wire.ProxyPort), mux, nil) }()
	return <-failed
}

func (p *sidecar) passOn(ctx context.Context, addr string) error {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	if p.transparent {
		lc.Control = transparent
	}
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		} else if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			in := wire.Inbound{Peer: c.RemoteAddr().String()}
			dst, up, err := p.upstream(ctx, c)
			in.OriginalDst = dst.String()
			if err != nil {
				in.Error = err.Error()
			}
			p.mu.Lock()
			p.inbound = append(p.inbound, in)
			p.mu.Unlock()
			if err == nil {
				splice(c, up)
			}
		}()
	}
}

func (p *sidecar) upstream(ctx context.Context, c net.Conn) (dst netip.AddrPort, up net.Conn, err error) {
	d := net.Dialer{Timeout: time.Minute}
	if p.transparent {
		// Nothing was rewritten: the connection has both addresses.
		dst = c.LocalAddr().(*net.TCPAddr).AddrPort()
		d.LocalAddr = &net.TCPAddr{IP: c.RemoteAddr().(*net.TCPAddr).IP}
		d.Control = marked
	} else {
		if dst, err = originalDst(c); err != nil {
			return dst, nil, fmt.Errorf("original destination: %w", err)
		}
		d.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 6)}
		if dst.Addr().Is6() {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP("::6")}
		}
	}
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	d.SetMultipathTCP(false)
	up, err = d.DialContext(ctx, "tcp", dst.String())
	return dst, up, err
}

// transparent is a ListenConfig's Control: the socket may have others' addresses.
func transparent(network, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) {
		level, option := unix.SOL_IP, unix.IP_TRANSPARENT
		if network == "tcp6" {
			level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
		}
		err = unix.SetsockoptInt(int(fd), level, option, 1)
	})
	return errors.Join(cerr, err)
}

// marked is a Dialer's Control: transparent, and with the mark that leads the
// answers back to the proxy. A listener must not have it: the kernel would lead
// its answers to clients there as well.
func marked(network, addr string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 1337) })
	return errors.Join(cerr, err, transparent(network, addr, c))
}

func splice(a, b net.Conn) {
	defer b.Close()
	var done sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		done.Go(func() {
			_, _ = io.Copy(way[0], way[1]) // ends when either side does
			_ = way[0].(*net.TCPConn).CloseWrite()
		})
	}
	done.Wait()
}

// originalDst asks as proxies do, without any privilege.
func originalDst(c net.Conn) (dst netip.AddrPort, err error) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return dst, errors.New("not TCP")
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return dst, err
	}
	local := tcp.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	cerr := raw.Control(func(fd uintptr) {
		if local.Is4() {
			var mreq *unix.IPv6Mreq // 16 bytes and more, as a sockaddr_in has
			if mreq, err = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST); err == nil {
				b := mreq.Multiaddr
				dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
			}
			return
		}
		var info *unix.IPv6MTUInfo // begins with a sockaddr_in6
		if info, err = unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, unix.SO_ORIGINAL_DST); err == nil {
			port := info.Addr.Port // in network byte order
			dst = netip.AddrPortFrom(netip.AddrFrom16(info.Addr.Addr), port>>8|port<<8)
		}
	})
	if cerr != nil {
		return dst, cerr
	}
	return dst, err
}
