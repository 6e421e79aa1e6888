// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/e2e/wire"
)

type sidecar struct {
	mu      sync.Mutex
	inbound []wire.Inbound
}

type originalKey struct{}

// proxy answers what its pod dials, and passes on what its pod is dialled for,
// from the source address that tells the redirection to leave it alone.
func proxy(ctx context.Context) error {
	p := &sidecar{}
	failed := make(chan error, 3)
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
			dst, up, err := upstream(ctx, c)
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

func upstream(ctx context.Context, c net.Conn) (dst netip.AddrPort, up net.Conn, err error) {
	if dst, err = originalDst(c); err != nil {
		return dst, nil, fmt.Errorf("original destination: %w", err)
	}
	source := netip.MustParseAddr("127.0.0.6")
	if dst.Addr().Is6() {
		source = netip.MustParseAddr("::6")
	}
	d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))}
	d.SetMultipathTCP(false)
	up, err = d.DialContext(ctx, "tcp", dst.String())
	return dst, up, err
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
