// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// passthrough6 is the address from which the proxy talks to its own app over
// IPv6. Its IPv4 counterpart, 127.0.0.6, is there without being put on lo.
var passthrough6 = netip.MustParsePrefix("::6/128")

// A Netns is a pod's network namespace, looked at once.
type Netns struct {
	own  fd // the namespace that we are from; -1: not opened yet
	fd   fd
	path string
	rt   *rtnl
	// Cookie names the namespace until reboot; it is never used again.
	Cookie uint64
	// Inode is the number by which /proc and the kernel's link info know it.
	Inode uint32
	// Addrs are the addresses on its interfaces, without 127.0.0.0/8 and
	// ::1, in the kernel's order.
	Addrs []netip.Addr
	// Sources says which source address the kernel takes towards a
	// destination. It is empty where the pod has no choice: one global
	// address of a family.
	Sources []Source
}

// A Source is the address that the kernel takes towards destinations in Prefix;
// of several that fit, the longest prefix decides.
type Source struct {
	Prefix netip.Prefix
	Addr   netip.Addr
}

// ErrHostNetns says that a network namespace is the host's own, which is never
// programmed.
var ErrHostNetns = errors.New("it is the host's own network namespace")

// errNotNamespace: the file is there, but nothing is mounted on it any more.
var errNotNamespace = errors.New("it is not a namespace")

// OpenNetns looks at the network namespace at path. It changes nothing in it.
func OpenNetns(path string) (_ *Netns, err error) {
	f, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	n := &Netns{fd: fd(f), own: -1, path: path}
	defer func() {
		if err != nil {
			n.Close()
			err = fmt.Errorf("network namespace %s: %w", path, err)
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(f, &st); err != nil {
		return nil, err
	}
	n.Inode = uint32(st.Ino)
	var vfs unix.Statfs_t
	if err := unix.Fstatfs(f, &vfs); err != nil {
		return nil, err
	} else if vfs.Type != unix.NSFS_MAGIC {
		return nil, errNotNamespace
	}
	// Process 1's may be hidden from us; look compares with our own.
	var host unix.Stat_t
	if err := unix.Stat("/proc/1/ns/net", &host); err == nil && host.Ino == st.Ino && host.Dev == st.Dev {
		return nil, ErrHostNetns
	}
	if err := n.look(); err != nil {
		return nil, err
	}
	return n, n.readSources()
}

// Close lets go of the namespace.
func (n *Netns) Close() {
	if n.rt != nil {
		n.rt.close()
	}
	n.fd.close()
	if n.own >= 0 {
		n.own.close()
	}
}

// look opens a routing socket in the namespace, and asks it for the namespace's
// cookie and addresses.
func (n *Netns) look() error {
	var err error
	if err := n.do(func() error { n.rt, err = openRTNL(); return err }); err != nil {
		return err
	}
	n.Cookie, err = unix.GetsockoptUint64(n.rt.fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		// Linux 5.14, commit e8b9eab99232.
		return fmt.Errorf("%w: get its cookie (since Linux 5.14): %w", ErrRefused, err)
	}
	if err != nil {
		return fmt.Errorf("get its cookie: %w", err)
	}
	addrs, err := n.rt.addrs()
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	n.Addrs = slices.DeleteFunc(addrs, netip.Addr.IsLoopback)
	return nil
}

// openOwn opens the namespace to come back to, once, and refuses to leave it for
// itself.
func (n *Netns) openOwn() error {
	if n.own >= 0 {
		return nil
	}
	own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open own network namespace: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(own, &st); err != nil || uint32(st.Ino) == n.Inode {
		unix.Close(own)
		if err == nil {
			err = ErrHostNetns
		}
		return err
	}
	n.own = fd(own)
	return nil
}

// do runs fn on a thread inside the namespace, unless that is our own.
func (n *Netns) do(fn func() error) error {
	runtime.LockOSThread()
	if err := n.openOwn(); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	if err := unix.Setns(int(n.fd), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter: %w", err)
	}
	defer func() {
		// A thread that can't come back is left locked: it dies with its
		// goroutine rather than serve others from the wrong place.
		if unix.Setns(int(n.own), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return fn()
}

// retryDump repeats a netlink dump that a change interrupted.
func retryDump[T any](dump func() ([]T, error)) (out []T, err error) {
	for range 5 {
		if out, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return out, err
}

// First returns the pod's first global address of a family, the one that the
// kernel takes as source where it has no better reason; invalid without one.
func (n *Netns) First(ipv4 bool) netip.Addr {
	for _, a := range n.Addrs {
		if a.Is4() == ipv4 && isGlobal(a) {
			return a
		}
	}
	return netip.Addr{}
}

func isGlobal(a netip.Addr) bool {
	return !a.IsLinkLocalUnicast() && a != passthrough6.Addr()
}

// readSources asks the kernel, route by route, which source it takes, where a
// family has more than one global address.
func (n *Netns) readSources() error {
	var h *netlink.Handle
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		ipv4 := family == netlink.FAMILY_V4
		var own []netip.Addr
		for _, a := range n.Addrs {
			if a.Is4() == ipv4 && isGlobal(a) {
				own = append(own, a)
			}
		}
		if len(own) < 2 {
			continue
		}
		if h == nil {
			var err error
			if h, err = netlink.NewHandleAt(netns.NsHandle(n.fd), unix.NETLINK_ROUTE); err != nil {
				return fmt.Errorf("open netlink: %w", err)
			}
			defer h.Close()
		}
		routes, err := retryDump(func() ([]netlink.Route, error) { return h.RouteList(nil, family) })
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		bits := 128
		if ipv4 {
			bits = 32
		}
		prefixes := map[netip.Prefix]bool{}
		for _, r := range routes {
			switch p, ok := toPrefix(r.Dst); {
			case r.Dst == nil:
				prefixes[netip.PrefixFrom(zero(ipv4), 0)] = true
			case ok:
				prefixes[p] = true
			}
		}
		// IPv6 prefers, on one interface, the address that shares the
		// longest prefix with the destination: ask at each too.
		if !ipv4 {
			for _, a := range own {
				for _, l := range []int{32, 48, 64} {
					prefixes[netip.PrefixFrom(a, l).Masked()] = true
				}
			}
		}
		for p := range prefixes {
			at := p.Addr()
			if p.Bits() < bits {
				at = at.Next() // not the network's own address
			}
			got, err := h.RouteGet(at.AsSlice())
			if err != nil || len(got) == 0 {
				continue // unreachable: no connection will leave by it
			}
			src, ok := netip.AddrFromSlice(got[0].Src)
			if src = src.Unmap(); ok && slices.Contains(own, src) {
				n.Sources = append(n.Sources, Source{Prefix: p, Addr: src})
			}
		}
	}
	slices.SortFunc(n.Sources, func(a, b Source) int { return a.Prefix.Compare(b.Prefix) })
	return nil
}

func zero(ipv4 bool) netip.Addr {
	if ipv4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func toPrefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a, ones), ok
}

// addPassthrough puts ::6 on lo, if the pod has IPv6 and it is not there yet.
func (n *Netns) addPassthrough() (added bool, err error) {
	if !n.First(false).IsValid() || slices.Contains(n.Addrs, passthrough6.Addr()) {
		return false, nil
	}
	if err := n.rt.onLo(unix.RTM_NEWADDR, passthrough6); err != nil {
		return false, fmt.Errorf("put %v on lo: %w", passthrough6, err)
	}
	return true, nil
}

func (n *Netns) removePassthrough() error {
	if err := n.rt.onLo(unix.RTM_DELADDR, passthrough6); err != nil {
		return fmt.Errorf("take %v off lo: %w", passthrough6, err)
	}
	return nil
}
