// SPDX-License-Identifier: Apache-2.0

// Package tproxy makes a pod's network namespace ready for TPROXY mode: what the
// app answers to a connection that the proxy made from a client's address must
// come back to the proxy, not leave the pod. Such a connection bears Mark; the
// app's socket takes that over, and a routing rule leads all that bears it to a
// table in which everything is local.
package tproxy

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Mark is what such packets bear, and what the rule that looks up Table asks
// for: both as a pod's proxy knows them from other redirectors.
const (
	Mark  = 0x539
	Table = 133
)

// loIndex is lo's, in every network namespace.
const loIndex = 1

// A Netns is a pod's network namespace.
type Netns struct {
	FD int
	// Do runs a function on a thread inside of it.
	Do   func(func() error) error
	IPv6 bool // IPv6 is there and not switched off
}

// HasIPv6 says of the namespace that the calling thread is in whether IPv6 is
// there and not switched off, for all that is and all that is to come.
func HasIPv6() (bool, error) {
	addrs, err := os.ReadFile("/proc/thread-self/net/if_inet6")
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // a kernel without IPv6
	}
	if err != nil {
		return false, fmt.Errorf("list IPv6 addresses: %w", err)
	}
	return len(addrs) > 0 || !isOne(sysctlDir+"ipv6/conf/all/disable_ipv6") || !isOne(sysctlDir+"ipv6/conf/default/disable_ipv6"), nil
}

func isOne(path string) bool {
	b, err := os.ReadFile(path)
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

const sysctlDir = "/proc/sys/net/" // of the thread's network namespace

// keys are the sysctls that are switched on: the app's socket takes the mark
// over, and so does what is sent by no socket.
func (n Netns) keys() []string {
	list := []string{"ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect"}
	if n.IPv6 {
		list = append(list, "ipv6/fwmark_reflect")
	}
	return list
}

// Sysctls reads, below /proc/sys/net, what Prepare is going to switch on.
func (n Netns) Sysctls() (values map[string]string, err error) {
	values = map[string]string{}
	err = n.Do(func() error {
		for _, key := range n.keys() {
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

// Before corrects what a record says the sysctls were. One that says 1 of what is
// not 1 now was read while another backend had switched it on, which has put it back
// since.
func (n Netns) Before(recorded map[string]string) (map[string]string, error) {
	now, err := n.Sysctls()
	if err != nil {
		return nil, err
	}
	before := maps.Clone(recorded)
	for key, value := range recorded {
		if is, ok := now[key]; ok && value == "1" {
			before[key] = is
		}
	}
	return before, nil
}

func (n Netns) set(values map[string]string) error {
	return n.Do(func() error {
		for _, key := range slices.Sorted(maps.Keys(values)) {
			if err := os.WriteFile(sysctlDir+key, []byte(values[key]), 0); err != nil {
				return fmt.Errorf("set sysctl: %w", err)
			}
		}
		return nil
	})
}

// Prepare switches on what Sysctls has read, and makes the rule and its table.
// It may be repeated.
func (n Netns) Prepare(sysctls map[string]string) error {
	on := map[string]string{}
	for key := range sysctls {
		on[key] = "1"
	}
	if err := n.set(on); err != nil {
		return err
	}
	return n.route(func(h *netlink.Handle) error {
		for _, f := range n.families() {
			// The route first: a rule without it would lead on to others.
			if err := h.RouteAdd(route(f)); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("add the %s route of table %d: %w", name(f), Table, err)
			}
			if err := h.RuleAdd(rule(f)); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("add the %s rule for mark %#x: %w", name(f), Mark, err)
			}
		}
		return nil
	})
}

// Undo undoes Prepare; sysctls are what they were before. It may be repeated.
func (n Netns) Undo(sysctls map[string]string) error {
	return errors.Join(n.set(sysctls), n.route(func(h *netlink.Handle) error {
		var errs []error
		try := func(what string, err error) {
			if err != nil && !isGone(err) {
				errs = append(errs, fmt.Errorf("remove %s: %w", what, err))
			}
		}
		for _, f := range n.families() {
			try(fmt.Sprintf("the %s rule for mark %#x", name(f), Mark), h.RuleDel(rule(f)))
			try(fmt.Sprintf("the %s route of table %d", name(f), Table), h.RouteDel(route(f)))
		}
		return errors.Join(errs...)
	}))
}

// isGone: what is to be removed is not there, nor may be its whole family.
func isGone(err error) bool {
	for _, e := range []error{unix.ENOENT, unix.ESRCH, unix.EAFNOSUPPORT, unix.ENODEV} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Check says what Prepare has made and is not there; nil for nothing.
func (n Netns) Check(sysctls map[string]string) (missing []string, err error) {
	now, err := n.Sysctls()
	if err != nil {
		return missing, err
	}
	for _, key := range slices.Sorted(maps.Keys(sysctls)) {
		if now[key] != "1" {
			missing = append(missing, fmt.Sprintf("sysctl net/%s is %q, it should be 1", key, now[key]))
		}
	}
	err = n.route(func(h *netlink.Handle) error {
		for _, f := range n.families() {
			rules, err := h.RuleListFiltered(f, &netlink.Rule{Mark: Mark, Table: Table}, netlink.RT_FILTER_MARK|netlink.RT_FILTER_TABLE)
			if err != nil {
				return fmt.Errorf("list %s rules: %w", name(f), err)
			}
			if len(rules) != 1 {
				missing = append(missing, fmt.Sprintf("%d %s routing rules lead mark %#x to table %d, there should be 1", len(rules), name(f), Mark, Table))
			}
			routes, err := h.RouteListFiltered(f, &netlink.Route{Table: Table}, netlink.RT_FILTER_TABLE)
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("list %s routes: %w", name(f), err)
			}
			local := 0
			for _, x := range routes {
				if x.Type == unix.RTN_LOCAL && x.LinkIndex == loIndex && isDefault(x.Dst) {
					local++
				}
			}
			if local != 1 {
				missing = append(missing, fmt.Sprintf("%d %s routes of table %d make everything local, there should be 1", local, name(f), Table))
			}
		}
		return nil
	})
	return missing, err
}

func isDefault(dst *net.IPNet) bool {
	if dst == nil {
		return true
	}
	ones, _ := dst.Mask.Size()
	return ones == 0
}

// route calls fn with a handle for the namespace.
func (n Netns) route(fn func(h *netlink.Handle) error) error {
	h, err := netlink.NewHandleAt(netns.NsHandle(n.FD), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	return fn(h)
}

func (n Netns) families() []int {
	if n.IPv6 {
		return []int{unix.AF_INET, unix.AF_INET6}
	}
	return []int{unix.AF_INET}
}

func name(family int) string {
	if family == unix.AF_INET6 {
		return "IPv6"
	}
	return "IPv4"
}

func rule(family int) *netlink.Rule {
	r := netlink.NewRule()
	full := uint32(0xffffffff)
	// A priority of one's own keeps the kernel from taking a second one.
	r.Family, r.Mark, r.Mask, r.Table, r.Priority = family, Mark, &full, Table, Table
	return r
}

// route makes everything local that comes to its table.
func route(family int) *netlink.Route {
	dst := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if family == unix.AF_INET6 {
		dst = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	r := &netlink.Route{Family: family, Table: Table, Type: unix.RTN_LOCAL, LinkIndex: loIndex, Dst: dst}
	if family == unix.AF_INET {
		r.Scope = netlink.SCOPE_HOST
	}
	return r
}
