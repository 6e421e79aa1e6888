// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/loader"
)

// passthrough6 is S6, from which the proxy talks to its app over IPv6.
var passthrough6 = netip.MustParsePrefix("::6/128")

// loIndex is lo's, in every network namespace.
const loIndex = 1

// A namespace is a pod's network namespace, open.
type namespace struct {
	fd   int
	path string
	// users is the user namespace that owns it, where that is not ours; else
	// -1.
	users int

	inode uint64
	// cookie names the namespace until reboot. 0: the kernel has none to give
	// (before Linux 5.14, commit e8b9eab99232).
	cookie uint64

	ipv6  bool // IPv6 is there and not switched off
	has6  bool // a global IPv6 address is there
	hasS6 bool // ::6 is there
}

// errNotNamespace: the file is there, but nothing is mounted on it any more.
var errNotNamespace = errors.New("it is not a namespace")

// openNamespace looks at the network namespace at path. It changes nothing.
func openNamespace(path string) (_ *namespace, err error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	n := &namespace{fd: fd, path: path, users: -1}
	defer func() {
		if err != nil {
			n.close()
			err = fmt.Errorf("network namespace %s: %w", path, err)
		}
	}()
	var st, host unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	n.inode = st.Ino
	var vfs unix.Statfs_t
	if err := unix.Fstatfs(fd, &vfs); err != nil {
		return nil, err
	} else if vfs.Type != unix.NSFS_MAGIC {
		return nil, errNotNamespace
	}
	// Process 1's may be hidden from us; do compares with our own.
	if err := unix.Stat("/proc/1/ns/net", &host); err == nil && host.Ino == st.Ino && host.Dev == st.Dev {
		return nil, loader.ErrHostNetns
	}
	if err := n.do(n.look); err != nil {
		return nil, err
	}
	return n, n.findUsers()
}

func (n *namespace) close() {
	for _, fd := range []int{n.fd, n.users} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// do runs fn on a thread inside the namespace, unless that is our own.
func (n *namespace) do(fn func() error) error {
	return onThread(func() error {
		var own unix.Stat_t
		if err := unix.Stat(threadNetns, &own); err != nil {
			return err
		}
		if own.Ino == n.inode {
			return loader.ErrHostNetns
		}
		if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter: %w", err)
		}
		return fn()
	})
}

const threadNetns = "/proc/thread-self/ns/net"

// onThread runs fn, which may leave the thread in another network namespace.
func onThread(fn func() error) error {
	runtime.LockOSThread()
	own, err := unix.Open(threadNetns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer func() {
		// A thread that can't come back is left locked: it dies with its
		// goroutine rather than serve others from the wrong place.
		if unix.Setns(own, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		unix.Close(own)
	}()
	return fn()
}

// look is called inside the namespace.
func (n *namespace) look() error {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket in it: %w", err)
	}
	n.cookie, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	unix.Close(s)
	if err != nil && !errors.Is(err, unix.ENOPROTOOPT) {
		return fmt.Errorf("get its cookie: %w", err)
	}
	addrs, err := os.ReadFile("/proc/thread-self/net/if_inet6")
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a kernel without IPv6
	}
	if err != nil {
		return fmt.Errorf("list IPv6 addresses: %w", err)
	}
	for line := range bytes.Lines(addrs) {
		var b [16]byte
		if len(line) < 32 {
			continue
		}
		if _, err := hex.Decode(b[:], line[:32]); err != nil {
			return fmt.Errorf("list IPv6 addresses: %w", err)
		}
		switch a := netip.AddrFrom16(b); {
		case a == passthrough6.Addr():
			n.hasS6 = true
		case !a.IsLoopback() && !a.IsLinkLocalUnicast():
			n.has6 = true
		}
	}
	// Switched off for all and for what is to come, and nowhere on again: an
	// address that comes must be covered.
	n.ipv6 = len(addrs) > 0 || !isOne("/proc/sys/net/ipv6/conf/all/disable_ipv6") || !isOne("/proc/sys/net/ipv6/conf/default/disable_ipv6")
	return nil
}

func isOne(path string) bool {
	b, err := os.ReadFile(path)
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

// findUsers asks who owns the namespace: -m owner can be put into it from its
// own user namespace only (owner_check in net/netfilter/xt_owner.c).
func (n *namespace) findUsers() error {
	const nsGetUserns = 0xb701 // NS_GET_USERNS
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(n.fd), nsGetUserns, 0)
	if errno != 0 {
		return fmt.Errorf("get its user namespace: %w", errno)
	}
	var own, its unix.Stat_t
	err := unix.Fstat(int(r), &its)
	if err == nil {
		err = unix.Stat("/proc/self/ns/user", &own)
	}
	if err != nil || its.Ino == own.Ino && its.Dev == own.Dev {
		unix.Close(int(r))
		return err
	}
	n.users = int(r)
	unix.CloseOnExec(n.users)
	return nil
}

// families are those that the pod has.
func (n *namespace) families() []Family {
	if n.ipv6 {
		return []Family{IPv4, IPv6}
	}
	return []Family{IPv4}
}

// traces says for each mode whether something of ours may be there, as the
// kernel tells without any program's help.
type traces struct {
	nft, legacy bool
}

func (t traces) of(m Mode) bool {
	if m == NFT {
		return t.nft
	}
	return t.legacy
}

func (n *namespace) traces() (t traces, err error) {
	err = n.do(func() error {
		t.nft = nftChains()
		for _, list := range []string{"ip_tables_names", "ip6_tables_names"} {
			// A table is listed from its first use in a namespace. What is
			// in it, only the program can tell.
			b, err := os.ReadFile("/proc/thread-self/net/" + list)
			t.legacy = t.legacy || len(b) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist)
		}
		return nil
	})
	return t, err
}

// nftChains asks nf_tables whether it has a chain of ours; where there is no
// telling, it may have. It reads only, and it waits for nobody.
func nftChains() bool {
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return !errors.Is(err, unix.EPROTONOSUPPORT)
	}
	defer unix.Close(s)
	_ = unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
	const (
		getChain  = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETCHAIN
		nfgenmsg  = 4 // family (0: any), version, resource id
		chainName = unix.NFTA_CHAIN_NAME
	)
	q := make([]byte, unix.SizeofNlMsghdr+nfgenmsg)
	h := (*unix.NlMsghdr)(unsafe.Pointer(unsafe.SliceData(q)))
	*h = unix.NlMsghdr{Len: uint32(len(q)), Type: getChain, Flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP, Seq: 1}
	if err := unix.Sendto(s, q, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return true
	}
	buf := make([]byte, 32<<10)
	for {
		k, _, err := unix.Recvfrom(s, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return true
		}
		msgs, err := syscall.ParseNetlinkMessage(buf[:k])
		if err != nil {
			return true
		}
		for _, m := range msgs {
			switch {
			case m.Header.Flags&unix.NLM_F_DUMP_INTR != 0:
				return true
			case m.Header.Type == unix.NLMSG_DONE:
				return false
			case m.Header.Type == unix.NLMSG_ERROR:
				if len(m.Data) < 4 {
					return true
				}
				// What a kernel without nf_tables answers.
				errno := unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
				return errno != unix.EINVAL && errno != unix.EOPNOTSUPP
			}
			for attrs := m.Data[min(nfgenmsg, len(m.Data)):]; len(attrs) >= unix.SizeofNlAttr; {
				size, typ := int(binary.NativeEndian.Uint16(attrs)), binary.NativeEndian.Uint16(attrs[2:])
				if size < unix.SizeofNlAttr || size > len(attrs) {
					return true
				}
				if typ == chainName && ours(string(attrs[unix.SizeofNlAttr:size])) {
					return true
				}
				attrs = attrs[min((size+3)&^3, len(attrs)):]
			}
		}
	}
}

// route is a handle for what netlink has to do in the namespace.
func (n *namespace) route(fn func(h *netlink.Handle) error) error {
	h, err := netlink.NewHandleAt(netns.NsHandle(n.fd), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	return fn(h)
}

func linkLo() netlink.Link {
	return &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: loIndex}}
}

func addrS6() *netlink.Addr {
	return &netlink.Addr{
		IPNet: &net.IPNet{IP: passthrough6.Addr().AsSlice(), Mask: net.CIDRMask(128, 128)},
		Flags: unix.IFA_F_NODAD,
	}
}

func markRule(f Family) *netlink.Rule {
	r := netlink.NewRule()
	full := uint32(0xffffffff)
	// A priority of one's own keeps the kernel from taking a second one.
	r.Family, r.Mark, r.Mask, r.Table, r.Priority = nlFamily(f), Mark, &full, Table, Table
	return r
}

// markRoute makes everything local that comes to its table.
func markRoute(f Family) *netlink.Route {
	dst := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if f == IPv6 {
		dst = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	r := &netlink.Route{Family: nlFamily(f), Table: Table, Type: unix.RTN_LOCAL, LinkIndex: loIndex, Dst: dst}
	if f == IPv4 {
		r.Scope = netlink.SCOPE_HOST
	}
	return r
}

func nlFamily(f Family) int {
	if f == IPv6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// tproxySysctls are switched on in TPROXY mode, below /proc/sys/net.
func tproxySysctls(families []Family) []string {
	list := []string{"ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect"}
	if slices.Contains(families, IPv6) {
		list = append(list, "ipv6/fwmark_reflect")
	}
	return list
}

const sysctlDir = "/proc/sys/net/" // of the thread's network namespace

// sysctls reads what tproxySysctls are.
func (n *namespace) sysctls() (values map[string]string, err error) {
	values = map[string]string{}
	err = n.do(func() error {
		for _, key := range tproxySysctls(n.families()) {
			b, err := os.ReadFile(sysctlDir + key)
			if err != nil {
				return fmt.Errorf("read sysctl: %w", err)
			}
			values[key] = strings.TrimSpace(string(b))
		}
		return nil
	})
	return values, err
}

func (n *namespace) setSysctls(values map[string]string) error {
	return n.do(func() error {
		for key, value := range values {
			if err := os.WriteFile(sysctlDir+key, []byte(value), 0); err != nil {
				return fmt.Errorf("set sysctl: %w", err)
			}
		}
		return nil
	})
}

// prepare makes what the rules of a record need.
func (n *namespace) prepare(r *record) error {
	if !r.S6 && !r.TProxy {
		return nil
	}
	if r.TProxy {
		on := map[string]string{}
		for key := range r.Sysctls {
			on[key] = "1"
		}
		if err := n.setSysctls(on); err != nil {
			return err
		}
	}
	return n.route(func(h *netlink.Handle) error {
		if r.S6 {
			if err := h.AddrAdd(linkLo(), addrS6()); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("put %v on lo: %w", passthrough6, err)
			}
		}
		if !r.TProxy {
			return nil
		}
		for _, f := range r.families() {
			// The route first: a rule without it would lead on to others.
			if err := h.RouteAdd(markRoute(f)); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("add the %v route of table %d: %w", f, Table, err)
			}
			if err := h.RuleAdd(markRule(f)); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("add the %v rule for mark %#x: %w", f, Mark, err)
			}
		}
		return nil
	})
}

// unprepare undoes prepare.
func (n *namespace) unprepare(r *record) error {
	if !r.S6 && !r.TProxy {
		return nil
	}
	var sysctls error
	if r.TProxy {
		sysctls = n.setSysctls(r.Sysctls)
	}
	return errors.Join(sysctls, n.route(func(h *netlink.Handle) error {
		var errs []error
		try := func(what string, err error) {
			if err != nil && !isGone(err) {
				errs = append(errs, fmt.Errorf("remove %s: %w", what, err))
			}
		}
		if r.S6 {
			try("::6 from lo", h.AddrDel(linkLo(), addrS6()))
		}
		if r.TProxy {
			for _, f := range r.families() {
				try(fmt.Sprintf("the %v rule for mark %#x", f, Mark), h.RuleDel(markRule(f)))
				try(fmt.Sprintf("the %v route of table %d", f, Table), h.RouteDel(markRoute(f)))
			}
		}
		return errors.Join(errs...)
	}))
}

// isGone: what is to be removed is not there, nor may be its whole family.
func isGone(err error) bool {
	for _, e := range []error{unix.ENOENT, unix.ESRCH, unix.EADDRNOTAVAIL, unix.EAFNOSUPPORT, unix.ENODEV} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// checkPrepared says what prepare has made and is not there; "" for nothing.
func (n *namespace) checkPrepared(r *record) (missing []string, err error) {
	if r.S6 && !n.hasS6 {
		missing = append(missing, "::6/128 is not on lo")
	}
	if !r.TProxy {
		return missing, nil
	}
	now, err := n.sysctls()
	if err != nil {
		return missing, err
	}
	for _, key := range slices.Sorted(maps.Keys(r.Sysctls)) {
		if now[key] != "1" {
			missing = append(missing, fmt.Sprintf("sysctl net/%s is %q, it should be 1", key, now[key]))
		}
	}
	err = n.route(func(h *netlink.Handle) error {
		for _, f := range r.families() {
			rules, err := h.RuleListFiltered(nlFamily(f), &netlink.Rule{Mark: Mark, Table: Table}, netlink.RT_FILTER_MARK|netlink.RT_FILTER_TABLE)
			if err != nil {
				return fmt.Errorf("list %v rules: %w", f, err)
			}
			if len(rules) != 1 {
				missing = append(missing, fmt.Sprintf("%d %v routing rules lead mark %#x to table %d, there should be 1", len(rules), f, Mark, Table))
			}
			routes, err := h.RouteListFiltered(nlFamily(f), &netlink.Route{Table: Table}, netlink.RT_FILTER_TABLE)
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("list %v routes: %w", f, err)
			}
			local := 0
			for _, x := range routes {
				if ones := maskOf(x.Dst); x.Type == unix.RTN_LOCAL && x.LinkIndex == loIndex && ones == 0 {
					local++
				}
			}
			if local != 1 {
				missing = append(missing, fmt.Sprintf("%d %v routes of table %d make everything local, there should be 1", local, f, Table))
			}
		}
		return nil
	})
	return missing, err
}

func maskOf(dst *net.IPNet) int {
	if dst == nil {
		return 0
	}
	ones, _ := dst.Mask.Size()
	return ones
}
