// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/probe"
	"shunt.dev/shunt/internal/probe/scratch"
)

// traffic finds out about the inbound hook tc, on the lo of a network namespace
// that is made for it.
func (p *prober) traffic() {
	row := func(name, since, neededFor string) probe.Row {
		return probe.Row{Name: name, Group: probe.GroupTC, Since: since, NeededFor: neededFor}
	}
	n, err := scratch.NewNetns()
	if err != nil {
		err = unknownError{err}
	} else {
		defer n.Close()
		err = linkUp(n)
	}
	try := func(r probe.Row, why string, fn func() error) {
		failed := err
		if failed == nil {
			failed = fn()
		}
		p.add(r, why, failed)
	}
	try(row("tc-clsact", "4.5", probe.ForTC), "programs can be attached to an interface's ingress (clsact, cls_bpf)", func() error { return clsact(n) })
	try(row("tc-tcx", "6.6", probe.Optional), "and by a link", func() error { return tcx(n) })
	try(row("tc-sk-assign", "5.7", probe.ForTC), "a connection was given to a listener on another port", func() error { return tcAssign(n, false) })
	try(row("tc-reuseport", "6.6", probe.ForTC), "likewise to a listener with SO_REUSEPORT (as Envoy's)", func() error { return tcAssign(n, true) })
}

// loIndex is lo's, in every network namespace.
const loIndex = 1

func linkUp(n *scratch.Netns) error {
	h, err := netlink.NewHandleAt(netns.NsHandle(n.FD()), unix.NETLINK_ROUTE)
	if err == nil {
		defer h.Close()
		err = h.LinkSetUp(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: loIndex}})
	}
	if err != nil {
		return unknownError{fmt.Errorf("set a scratch lo up: %w", err)}
	}
	return nil
}

func passTC() (*ebpf.Program, error) {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: bpf.License,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}, // TC_ACT_OK
	})
	if err != nil {
		return nil, fmt.Errorf("load a program for it: %w", err)
	}
	return prog, nil
}

func clsact(n *scratch.Netns) error {
	prog, err := passTC()
	if err != nil {
		return err
	}
	defer prog.Close()
	detach, err := attachTC(n, prog)
	if err != nil {
		return err
	}
	return detach()
}

// attachTC attaches a program to the ingress of a namespace's lo.
func attachTC(n *scratch.Netns, prog *ebpf.Program) (detach func() error, err error) {
	h, err := netlink.NewHandleAt(netns.NsHandle(n.FD()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, unknownError{fmt.Errorf("open netlink: %w", err)}
	}
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: loIndex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	if err := h.QdiscAdd(qdisc); err != nil {
		h.Close()
		return nil, absent("add a clsact qdisc (CONFIG_NET_SCH_INGRESS)", err)
	}
	detach = func() error {
		defer h.Close()
		if err := h.QdiscDel(qdisc); err != nil {
			return unknownError{fmt.Errorf("delete a clsact qdisc: %w", err)}
		}
		return nil
	}
	err = h.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: loIndex, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Priority: 1, Protocol: unix.ETH_P_ALL,
		},
		Fd: prog.FD(), Name: "shunt-probe", DirectAction: true,
	})
	if err != nil {
		return nil, errors.Join(absent("add a cls_bpf filter (CONFIG_NET_CLS_BPF)", err), detach())
	}
	return detach, nil
}

// absent says what it means that the kernel knows no qdisc or filter of a kind.
func absent(what string, err error) error {
	err = fmt.Errorf("%s: %w", what, err)
	if errors.Is(err, unix.ENOENT) {
		return noError{err}
	}
	return err
}

func tcx(n *scratch.Netns) error {
	prog, err := passTC()
	if err != nil {
		return err
	}
	defer prog.Close()
	return n.Do(func() error {
		l, err := attach(prog, loIndex, ebpf.AttachTCXIngress)
		if err != nil {
			return err
		}
		defer l.Close()
		return l.Detach()
	})
}

// tcAssign has a program at the ingress of lo give a connection to one port to
// the listener on another, connects, and sees whether it got there.
func tcAssign(n *scratch.Netns, reuseport bool) error {
	var listener, reserved int
	var to, instead uint16
	err := n.Do(func() (err error) {
		if listener, to, err = boundSocket(reuseport); err == nil {
			if reserved, instead, err = boundSocket(false); err == nil {
				err = unix.Listen(listener, 1)
			}
		}
		return err
	})
	for _, s := range []int{listener, reserved} {
		if s > 0 {
			defer unix.Close(s)
		}
	}
	if err != nil {
		return unknownError{fmt.Errorf("listen: %w", err)}
	}
	answered, err := newResult()
	if err != nil {
		return unknownError{err}
	}
	defer answered.Close()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: bpf.License, Instructions: assignTo(to, instead, answered)})
	if err != nil {
		return fmt.Errorf("load a program that calls bpf_sk_assign: %w", err)
	}
	defer prog.Close()
	detach, err := attachTC(n, prog)
	if err != nil {
		return err
	}
	err = n.Do(func() error { return connectLo(instead) })
	errno, ran := answered.read()
	switch {
	case !ran:
		err = unknownError{fmt.Errorf("the program did not see the connection: %w", errors.Join(err, errNoSYN))}
	case errno != 0:
		err = noError{fmt.Errorf("bpf_sk_assign: %w", errno)}
	case err != nil:
		err = unknownError{fmt.Errorf("bpf_sk_assign took the listener, but connect fails: %w", err)}
	default:
		err = accepted(listener)
	}
	return errors.Join(err, detach())
}

var errNoSYN = errors.New("no SYN came by lo")

// assignTo is a program that has the listener on 127.0.0.1:to take the
// connections to another port, and notes what bpf_sk_assign answers.
func assignTo(to, instead uint16, answered result) asm.Instructions {
	const (
		ports  = 14 + 20 // after the headers of Ethernet and IPv4, which has no options here
		dport  = ports + 2
		flags  = ports + 13
		syn    = 0x02
		synAck = 0x12

		tuple     = -16 // on the stack: saddr, daddr, sport, dport, as in packets
		tupleSize = 12
	)
	loopback := int64(int32(binary.NativeEndian.Uint32([]byte{127, 0, 0, 1})))
	port := int64(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, to)))
	return slices.Concat(asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadAbs(dport, asm.Half),
		asm.JNE.Imm(asm.R0, int32(instead), "pass"),
		asm.LoadAbs(flags, asm.Byte),
		asm.And.Imm(asm.R0, synAck),
		asm.JNE.Imm(asm.R0, syn, "pass"),
		asm.StoreImm(asm.RFP, tuple, loopback, asm.Word),
		asm.StoreImm(asm.RFP, tuple+4, loopback, asm.Word),
		asm.StoreImm(asm.RFP, tuple+8, 0, asm.Half),
		asm.StoreImm(asm.RFP, tuple+10, port, asm.Half),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, tuple),
		asm.Mov.Imm(asm.R3, tupleSize),
		asm.Mov.Imm(asm.R4, -1), // this network namespace
		asm.Mov.Imm(asm.R5, 0),
		asm.FnSkLookupTcp.Call(),
		asm.Mov.Imm(asm.R8, -int32(unix.ENOENT)),
		asm.JEq.Imm(asm.R0, 0, "note"),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R2, asm.R7),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnSkAssign.Call(),
		asm.Mov.Reg(asm.R8, asm.R0),
		asm.Mov.Reg(asm.R1, asm.R7),
		asm.FnSkRelease.Call(),
		asm.Mov.Reg(asm.R0, asm.R0).WithSymbol("note"),
	}, answered.store(), asm.Instructions{
		asm.Mov.Imm(asm.R0, 0).WithSymbol("pass"),
		asm.Return(),
	})
}

// boundSocket is one at a free port of 127.0.0.1.
func boundSocket(reuseport bool) (s int, port uint16, err error) {
	s, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return 0, 0, err
	}
	if reuseport {
		err = unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	}
	if err == nil {
		err = unix.Bind(s, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	}
	if err == nil {
		var at unix.Sockaddr
		if at, err = unix.Getsockname(s); err == nil {
			port = uint16(at.(*unix.SockaddrInet4).Port) //nolint:forcetypeassert // an AF_INET socket's
		}
	}
	return s, port, err
}

var probeTimeout = unix.Timeval{Usec: 500_000}

// connectLo connects, which on lo is answered within the call.
func connectLo(port uint16) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	timeout := probeTimeout
	if err := unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout); err != nil {
		return err
	}
	return unix.Connect(s, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(port)})
}

// accepted fails unless a connection waits at a listener.
func accepted(listener int) error {
	timeout := probeTimeout
	if err := unix.SetsockoptTimeval(listener, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return unknownError{err}
	}
	s, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
	if err != nil {
		return unknownError{fmt.Errorf("bpf_sk_assign took the listener, but it has no connection: %w", err)}
	}
	unix.Close(s)
	return nil
}
