// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
)

// An InboundHook is where a pod's inbound connections are turned to its proxy.
type InboundHook string

// The inbound hooks. The empty one is SkLookup.
const (
	SkLookup InboundHook = "sk_lookup"
	TC       InboundHook = "tc"
)

// A TCInterface is an interface of a pod with the TC program at its ingress.
type TCInterface struct {
	Index uint32
	Name  string // for messages
	// Filter says that it is a filter of a clsact qdisc, as before Linux 6.6;
	// else a TCX link.
	Filter bool
}

// A pinned TCX link lies in the folder of the pod's netns links, under this name
// and the interface's index.
const tcLinkPrefix = "tc-"

// Our filter's place in a clsact qdisc. The first priority: a filter that says
// "ok" ends the matter for those behind it.
const (
	tcPriority = 1
	tcHandle   = 0x53484e54 // "SHNT"
)

// flagBefore is BPF_F_BEFORE of link creation, since Linux 6.6: with nothing named,
// first of all.
const flagBefore = 1 << 3

func (h InboundHook) valid() error {
	switch h {
	case "", SkLookup, TC:
		return nil
	}
	return fmt.Errorf("unknown inbound hook %q: want %q or %q", string(h), SkLookup, TC)
}

// planTC notes in the record what an attachment with its hook will have, and what
// an earlier one, old, has and this one will not.
func (d *Datapath) planTC(r *Record, n *Netns, old *Record) error {
	if err := r.InboundHook.valid(); err != nil {
		return err
	}
	if r.InboundHook == TC {
		r.Rules.Flags |= bpf.ShuntPodFlagPOD_IN_TC
		filters, err := d.needFilters()
		if err != nil {
			return err
		}
		if r.Interfaces, err = n.tcInterfaces(filters); err != nil {
			return err
		}
	}
	if old != nil {
		for _, i := range slices.Concat(old.Interfaces, old.Leaving) {
			if !slices.Contains(r.Interfaces, i) && !slices.Contains(r.Leaving, i) {
				r.Leaving = append(r.Leaving, i)
			}
		}
	}
	return nil
}

// needFilters reports whether the kernel has no TCX links.
func (d *Datapath) needFilters() (bool, error) {
	if d.opts.NoTCX {
		return true, nil
	}
	prog, err := d.tcProgram()
	if err != nil {
		return false, err
	}
	// There is no interface 0: a kernel that has TCX links looks for it.
	_, err = createTCX(prog, 0)
	switch {
	case errors.Is(err, unix.ENODEV):
		return false, nil
	case errors.Is(err, unix.EINVAL):
		return true, nil // before Linux 6.6, commit e420bed02507
	}
	return false, fmt.Errorf("ask the kernel for TCX links: %w", err)
}

// createTCX attaches a program to the ingress of an interface of the thread's
// network namespace, before all that are there.
func createTCX(prog fd, ifindex uint32) (fd, error) {
	attr := linkCreateAttr{progFD: uint32(prog), targetFD: ifindex, attachType: uint32(attachTCXIngress), flags: flagBefore}
	f, err := syscallBPF(unix.BPF_LINK_CREATE, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return -1, fmt.Errorf("attach to TCX ingress: %w", err)
	}
	return fd(f), nil
}

// tcInterfaces lists the namespace's interfaces other than lo, up or down.
func (n *Netns) tcInterfaces(filter bool) (out []TCInterface, err error) {
	all, err := n.Interfaces()
	for _, i := range all {
		out = append(out, TCInterface{Index: i.Index, Name: i.Name, Filter: filter})
	}
	return out, err
}

// linkTC makes sure of the program at each of the record's interfaces.
func (d *Datapath) linkTC(r *Record, n *Netns) error {
	prog, err := d.tcProgram()
	if err != nil {
		return err
	}
	dir := d.netnsLinks(r.Cookie)
	// Without links too: it says that the pod uses this build.
	if _, err := makeDir(dir); err != nil {
		return fmt.Errorf("make a folder for links: %w", err)
	}
	var filters *tcFilters
	for _, i := range r.Interfaces {
		if !i.Filter {
			if err := n.do(func() error { return linkTCX(dir, prog, i) }); err != nil {
				return err
			}
			continue
		}
		if filters == nil {
			if filters, err = openFilters(n); err != nil {
				return err
			}
			defer filters.close()
		}
		if err := filters.add(i, prog); err != nil {
			return fmt.Errorf("interface %s: %w", i.Name, err)
		}
	}
	return nil
}

func tcLinkPath(dir string, i TCInterface) string {
	return filepath.Join(dir, tcLinkPrefix+strconv.FormatUint(uint64(i.Index), 10))
}

// onInterface gives the test for a link to an interface's TCX ingress. The kernel
// forgets the index when the interface goes.
func onInterface(i TCInterface) func(*linkInfo) bool {
	return func(l *linkInfo) bool {
		index, at := l.netnsTarget() // laid out alike
		return index == i.Index && at == attachTCXIngress
	}
}

// linkTCX makes sure of one pinned link. A wrong one goes only when the right one
// is in its place.
func linkTCX(dir string, prog fd, i TCInterface) error {
	path := tcLinkPath(dir, i)
	good, err := linkIsGood(path, prog, onInterface(i))
	if err != nil || good {
		return err
	}
	l, err := createTCX(prog, i.Index)
	if err != nil {
		return fmt.Errorf("interface %s: %w", i.Name, err)
	}
	defer l.close()
	return l.repin(path)
}

// leave takes the program off the interfaces that the record no longer wants.
func (d *Datapath) leave(r *Record) error {
	if len(r.Leaving) == 0 {
		return nil
	}
	if err := d.unlinkTC(r, r.Leaving); err != nil {
		return err
	}
	r.Leaving = nil
	return d.writeRecord(r)
}

// unlinkTC takes the program off interfaces. Links need nothing but their pins. A
// filter goes with its interface or netns, if the record's path no longer leads
// there; where it does not go, it refuses: the pod's entries are no more. The
// qdisc stays in any case: no call removes it only if nobody uses it.
func (d *Datapath) unlinkTC(r *Record, interfaces []TCInterface) error {
	var errs []error
	var filters []TCInterface
	for _, i := range interfaces {
		if i.Filter {
			filters = append(filters, i)
			continue
		}
		path := tcLinkPath(d.netnsLinks(r.Cookie), i)
		errs = append(errs, unlink(path), unlink(path+"-new"))
	}
	if len(filters) > 0 {
		errs = append(errs, removeFilters(r, filters))
	}
	return errors.Join(errs...)
}

// tcLinks lists the interfaces whose links are pinned in a folder.
func tcLinks(dir string) (out []TCInterface, err error) {
	err = eachName(dir, func(name string) error {
		index, ok := strings.CutPrefix(strings.TrimSuffix(name, "-new"), tcLinkPrefix)
		if !ok {
			return nil
		}
		n, err := strconv.ParseUint(index, 10, 32)
		out = append(out, TCInterface{Index: uint32(n)})
		return err
	})
	return out, err
}

// unlinkAllTC takes the program off every interface that may have it.
func (d *Datapath) unlinkAllTC(r *Record) error {
	links, err := tcLinks(d.netnsLinks(r.Cookie))
	if err != nil {
		return err
	}
	for _, i := range slices.Concat(r.Interfaces, r.Leaving) {
		if i.Filter {
			links = append(links, i)
		}
	}
	return d.unlinkTC(r, links)
}

// wrongTC says what is wrong with the program at the pod's interfaces.
func (d *Datapath) wrongTC(r *Record) (wrong []string, err error) {
	prog, err := d.object(bpf.ShuntProgShuntTc)
	if err != nil {
		return nil, err
	}
	var n *Netns
	var filters *tcFilters
	for _, i := range r.Interfaces {
		var good bool
		switch {
		case !i.Filter:
			good, err = linkIsGood(tcLinkPath(d.netnsLinks(r.Cookie), i), prog, onInterface(i))
		case filters == nil:
			if n, err = r.netns(); err != nil || n == nil {
				return []string{fmt.Sprintf("the pod's network namespace is not at %s any more", r.Netns)}, err
			}
			defer n.Close()
			if filters, err = openFilters(n); err != nil {
				return nil, err
			}
			defer filters.close()
			fallthrough
		default:
			good, err = filters.isGood(i, prog)
		}
		if err != nil {
			return nil, err
		}
		if !good {
			wrong = append(wrong, fmt.Sprintf("the TC program is not attached to the pod's interface %s", i.Name))
		}
	}
	return wrong, nil
}

// tcFilters adds and removes our filter in a network namespace.
type tcFilters struct {
	nl *netlink.Handle
}

func openFilters(n *Netns) (*tcFilters, error) {
	nl, err := netlink.NewHandleAt(netns.NsHandle(n.fd), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return &tcFilters{nl}, nil
}

func (f *tcFilters) close() { f.nl.Close() }

func tcDevice(i TCInterface) netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: int(i.Index), Name: i.Name}}
}

// ours describes our filter; its program too, if there is one.
func ours(i TCInterface, prog fd) *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: int(i.Index), Parent: netlink.HANDLE_MIN_INGRESS,
			Handle: tcHandle, Priority: tcPriority, Protocol: unix.ETH_P_ALL,
		},
		Fd: int(prog), Name: bpf.ShuntProgShuntTc, DirectAction: true,
	}
}

var errForeignFilter = fmt.Errorf("priority %d, handle %#x has a filter that is not shunt's", tcPriority, tcHandle)

// find gives our filter at an interface; nil without one. One of somebody else's
// in its very place is an error.
func (f *tcFilters) find(i TCInterface) (*netlink.BpfFilter, error) {
	list, err := retryDump(func() ([]netlink.Filter, error) { return f.nl.FilterList(tcDevice(i), netlink.HANDLE_MIN_INGRESS) })
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil, nil // no such interface, or no qdisc at it
	}
	if err != nil {
		return nil, fmt.Errorf("list filters: %w", err)
	}
	for _, x := range list {
		if a := x.Attrs(); a.Priority != tcPriority || a.Handle != tcHandle {
			continue
		}
		if b, ok := x.(*netlink.BpfFilter); ok && b.Name == bpf.ShuntProgShuntTc {
			return b, nil
		}
		return nil, errForeignFilter
	}
	return nil, nil
}

func (f *tcFilters) isGood(i TCInterface, prog fd) (bool, error) {
	has, err := f.find(i)
	if err != nil || has == nil {
		return false, err
	}
	want, err := info[progInfo](prog)
	return err == nil && uint32(has.Id) == want.id, err
}

// add makes sure of our filter, and of a qdisc to hold it. One with another
// program gets this one in one go.
func (f *tcFilters) add(i TCInterface, prog fd) error {
	if good, err := f.isGood(i, prog); err != nil || good {
		return err
	}
	qdiscs, err := retryDump(func() ([]netlink.Qdisc, error) { return f.nl.QdiscList(tcDevice(i)) })
	if err != nil {
		return fmt.Errorf("list qdiscs: %w", err)
	}
	// The older kind, ingress, sits in the same place and takes the filter too.
	if !slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() == "clsact" || q.Type() == "ingress" }) {
		err := f.nl.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: int(i.Index), Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}})
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add clsact qdisc: %w", err)
		}
	}
	if err := f.nl.FilterReplace(ours(i, prog)); err != nil {
		return fmt.Errorf("add filter with priority %d: %w", tcPriority, err)
	}
	return nil
}

func removeFilters(r *Record, interfaces []TCInterface) error {
	n, err := r.netns()
	if err != nil || n == nil {
		return err
	}
	defer n.Close()
	f, err := openFilters(n)
	if err != nil {
		return err
	}
	defer f.close()
	var errs []error
	for _, i := range interfaces {
		has, err := f.find(i)
		if err == nil && has != nil {
			err = f.nl.FilterDel(ours(i, -1))
		}
		if err != nil && !errors.Is(err, errForeignFilter) {
			errs = append(errs, fmt.Errorf("remove the filter of interface %s: %w", i.Name, err))
		}
	}
	return errors.Join(errs...)
}

// tcProgram opens the node's TC program, and loads it before that if need be.
func (d *Datapath) tcProgram() (fd, error) {
	f, err := d.object(bpf.ShuntProgShuntTc)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	if err := d.loadTC(); err != nil {
		return -1, fmt.Errorf("load the TC program: %w", err)
	}
	return d.object(bpf.ShuntProgShuntTc)
}

// PrepareTC loads the TC program, unless it is loaded, so that no pod has to wait
// for that.
func (d *Datapath) PrepareTC() error {
	_, err := d.tcProgram()
	return err
}

// loadTC loads the program with the datapath's maps. Its pin is made in one step.
func (d *Datapath) loadTC() error {
	if d.opts.Programs == nil {
		return ErrNoPrograms
	}
	return d.opts.Programs.LoadTC(d.request(d.dir))
}
