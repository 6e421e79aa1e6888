// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/bpf/object"
	"shunt.dev/shunt/internal/testbed"
)

// A pod behind one of these paths has programs of the benchmark's own at the hooks
// that a redirected connection passes. They decide nothing and look nothing up: each
// path's do one thing more than the last one's, of what a redirection by these hooks
// can't be had without. What Shunt's own programs cost is to be held against the last.
const (
	// hooks: programs that do nothing.
	hooks path = "ebpf-empty"
	// rewrites: connect goes to the proxy.
	rewrites path = "ebpf-rewrite"
	// binds: and the socket is bound to the pod's address, which the proxy is to see.
	binds path = "ebpf-bind"
	// storesOne: and the connecting socket knows its original destination.
	storesOne path = "ebpf-store-1"
	// storesBoth: and the accepted one has room to know it.
	storesBoth path = "ebpf-store-2"
	// notes: and it goes from the one to the other: a note is made, read and removed.
	notes path = "ebpf-note"
	// watches: and a socket that closes before the other has read it takes its note away.
	watches path = "ebpf-watch"
	// keeps does as much in another way, without storage: what a socket has to know is in
	// maps, which can overflow, from connect until it closes.
	keeps path = "ebpf-maps"
)

// parts are these paths, in their order.
var parts = []path{hooks, rewrites, binds, storesOne, storesBoth, notes, watches, keeps}

// has reports whether programs of p do what those of q add.
func (p path) has(q path) bool {
	if p == keeps {
		p = binds // and what is its own
	}
	at := map[path]int{}
	for i, one := range parts {
		at[one] = i
	}
	return at[p] >= at[q]
}

// What the programs read of their contexts, and what the kernel calls it.
const (
	addrIP4, addrIP6, addrPort, addrSock = 4, 8, 24, 64 // struct bpf_sock_addr

	opsOp, opsState, opsFamily, opsRemote4, opsLocal4  = 0, 8, 20, 24, 28 // struct bpf_sock_ops
	opsRemote6, opsLocal6, opsRemotePort, opsLocalPort = 32, 48, 64, 68
	opsFlags, opsSock                                  = 84, 184

	onTCPConnect, onPassiveEstablished, onState = 3, 5, 10 // BPF_SOCK_OPS_*_CB
	stateFlag, stateClose                       = 1 << 2, 7

	createStorage = 1 // BPF_SK_STORAGE_GET_F_CREATE
)

// partMaps are those of a pod's programs: what they keep is as large as Shunt's own.
type partMaps struct {
	sockets *ebpf.Map // storage
	notes   *ebpf.Map // by a connection's ends
	origins *ebpf.Map // by a socket's cookie
}

func (m partMaps) close() {
	m.sockets.Close()
	m.notes.Close()
	m.origins.Close()
}

func newPartMaps(b *testing.B) partMaps {
	b.Helper()
	newMap := func(spec ebpf.MapSpec) *ebpf.Map {
		spec.Flags = unix.BPF_F_NO_PREALLOC
		m, err := ebpf.NewMap(&spec)
		if err != nil {
			b.Fatal(err)
		}
		return m
	}
	all, err := object.LoadShunt()
	if err != nil {
		b.Fatal(err)
	}
	sockets, inflight := all.Maps[bpf.ShuntMapSockets], all.Maps[bpf.ShuntMapInflight]
	return partMaps{
		sockets: newMap(ebpf.MapSpec{Name: "sockets", Type: ebpf.SkStorage, KeySize: 4, ValueSize: sockets.ValueSize, Key: sockets.Key, Value: sockets.Value}),
		origins: newMap(ebpf.MapSpec{Name: "origins", Type: ebpf.Hash, KeySize: 8, ValueSize: sockets.ValueSize, MaxEntries: inflight.MaxEntries}),
		notes:   newMap(ebpf.MapSpec{Name: "notes", Type: ebpf.Hash, KeySize: inflight.KeySize, ValueSize: inflight.ValueSize, MaxEntries: inflight.MaxEntries}),
	}
}

// word gives an address' i-th word as a program writes it.
func word(a netip.Addr, i int) int32 {
	return int32(binary.NativeEndian.Uint32(a.AsSlice()[4*i:]))
}

// connectPart is a program at connect.
func connectPart(p path, m partMaps, own netip.Addr) asm.Instructions {
	var code asm.Instructions
	to, size := netip.MustParseAddr("127.0.0.1"), int32(unix.SizeofSockaddrInet4)
	family, at, words := int64(unix.AF_INET), int16(addrIP4), 1
	if own.Is6() {
		to, size = netip.IPv6Loopback(), unix.SizeofSockaddrInet6
		family, at, words = unix.AF_INET6, addrIP6, 4
	}
	port := int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, proxyPort)))
	code = append(code, asm.Mov.Reg(asm.R6, asm.R1))
	if p.has(storesOne) {
		code = append(code,
			asm.LoadMapPtr(asm.R1, m.sockets.FD()),
			asm.LoadMem(asm.R2, asm.R6, addrSock, asm.DWord),
			asm.JEq.Imm(asm.R2, 0, "out"),
			asm.Mov.Imm(asm.R3, 0),
			asm.Mov.Imm(asm.R4, createStorage),
			asm.FnSkStorageGet.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
		)
		for i := range words {
			code = append(code,
				asm.LoadMem(asm.R1, asm.R6, at+int16(4*i), asm.Word),
				asm.StoreMem(asm.R0, int16(8+4*i), asm.R1, asm.Word))
		}
		code = append(code,
			asm.LoadMem(asm.R1, asm.R6, addrPort, asm.Word),
			asm.StoreMem(asm.R0, 4, asm.R1, asm.Word))
	}
	if p == keeps {
		value := int16(m.origins.ValueSize())
		code = append(code, zeros(cookieAt-value, value)...)
		for i := range words {
			code = append(code,
				asm.LoadMem(asm.R1, asm.R6, at+int16(4*i), asm.Word),
				asm.StoreMem(asm.RFP, cookieAt-value+int16(8+4*i), asm.R1, asm.Word))
		}
		code = append(code, m.origin()...)
		code = append(code,
			asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, int32(cookieAt-value)),
			asm.Mov.Imm(asm.R4, 0),
			asm.FnMapUpdateElem.Call())
	}
	if p.has(binds) {
		for i := range size / 4 {
			code = append(code, asm.StoreImm(asm.RFP, int16(4*i-32), 0, asm.Word))
		}
		code = append(code, asm.StoreImm(asm.RFP, -32, family, asm.Half))
		for i := range words {
			first := 4 // of struct sockaddr_in; of sockaddr_in6 it is 8
			if own.Is6() {
				first = 8
			}
			code = append(code, asm.StoreImm(asm.RFP, int16(first+4*i-32), int64(word(own, i)), asm.Word))
		}
		code = append(code,
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -32),
			asm.Mov.Imm(asm.R3, size),
			asm.FnBind.Call())
	}
	if p.has(rewrites) {
		for i := range words {
			code = append(code,
				asm.Mov.Imm(asm.R1, word(to, i)),
				asm.StoreMem(asm.R6, at+int16(4*i), asm.R1, asm.Word))
		}
		code = append(code,
			asm.Mov.Imm(asm.R1, port),
			asm.StoreMem(asm.R6, addrPort, asm.R1, asm.Word))
	}
	return append(code, asm.Mov.Imm(asm.R0, 1).WithSymbol("out"), asm.Return())
}

// zeros writes zeros to the stack.
func zeros(from, size int16) (code asm.Instructions) {
	code = append(code, asm.Mov.Imm(asm.R1, 0))
	for at := from; at < from+size; at += 8 {
		code = append(code, asm.StoreMem(asm.RFP, at, asm.R1, asm.DWord))
	}
	return code
}

// Of the stack.
const (
	noteAt   = -48
	cookieAt = -96
)

// origin writes the socket's cookie there and has R1 and R2 say so to a helper.
func (m partMaps) origin() asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.FnGetSocketCookie.Call(),
		asm.StoreMem(asm.RFP, cookieAt, asm.R0, asm.DWord),
		asm.LoadMapPtr(asm.R1, m.origins.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, cookieAt),
	}
}

// note writes a struct tuple there and has R1 and R2 say so to a helper. The ports
// are enough to tell a pod's connections to its proxy apart here.
func (m partMaps) note(atAccept bool) asm.Instructions {
	local, remote := int16(noteAt+40), int16(noteAt+42)
	if atAccept {
		local, remote = remote, local
	}
	return append(zeros(noteAt, -noteAt),
		asm.LoadMem(asm.R1, asm.R6, opsLocalPort, asm.Word),
		asm.StoreMem(asm.RFP, local, asm.R1, asm.Half),
		asm.LoadMem(asm.R1, asm.R6, opsRemotePort, asm.Word),
		asm.HostTo(asm.BE, asm.R1, asm.Word),
		asm.StoreMem(asm.RFP, remote, asm.R1, asm.Half),
		asm.LoadMapPtr(asm.R1, m.notes.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, noteAt))
}

func (m partMaps) again() asm.Instructions {
	return asm.Instructions{asm.LoadMapPtr(asm.R1, m.notes.FD()), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, noteAt)}
}

// insert makes a note of zeros, and has state callbacks come if they are to.
func (m partMaps) insert(watch bool) asm.Instructions {
	value := int16(m.notes.ValueSize())
	code := zeros(noteAt-value, value)
	code = append(code, m.note(false)...)
	code = append(code,
		asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, int32(noteAt-value)),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call())
	if watch {
		code = append(code, watchState()...)
	}
	return code
}

func watchState() asm.Instructions {
	return asm.Instructions{asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, stateFlag), asm.FnSockOpsCbFlagsSet.Call()}
}

// sockopsPart is the program at sockops.
func sockopsPart(p path, m partMaps) asm.Instructions {
	if p == keeps {
		return sockopsKeeps(m)
	}
	code := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R7, asm.R6, opsOp, asm.Word),
	}
	if p.has(notes) {
		code = append(code, asm.JNE.Imm(asm.R7, onTCPConnect, "accept"))
		code = append(code, m.insert(p.has(watches))...)
		code = append(code, asm.Ja.Label("out"))
	}
	if p.has(storesBoth) {
		code = append(code, asm.JNE.Imm(asm.R7, onPassiveEstablished, "state").WithSymbol("accept"))
		code = append(code, asm.Mov.Imm(asm.R8, 0))
		if p.has(notes) {
			code = append(code, m.note(true)...)
			code = append(code,
				asm.FnMapLookupElem.Call(),
				asm.JEq.Imm(asm.R0, 0, "out"),
				asm.LoadMem(asm.R8, asm.R0, 8, asm.DWord))
		}
		code = append(code,
			asm.LoadMapPtr(asm.R1, m.sockets.FD()),
			asm.LoadMem(asm.R2, asm.R6, opsSock, asm.DWord),
			asm.JEq.Imm(asm.R2, 0, "out"),
			asm.Mov.Imm(asm.R3, 0),
			asm.Mov.Imm(asm.R4, createStorage),
			asm.FnSkStorageGet.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
			asm.StoreMem(asm.R0, 8, asm.R8, asm.DWord))
		if p.has(notes) {
			code = append(code, m.again()...)
			code = append(code, asm.FnMapDeleteElem.Call())
		}
		code = append(code, asm.Ja.Label("out"))
		code = append(code, asm.JNE.Imm(asm.R7, onState, "out").WithSymbol("state"))
		if p.has(watches) {
			code = append(code,
				asm.LoadMem(asm.R1, asm.R6, opsState, asm.Word),
				asm.JNE.Imm(asm.R1, stateClose, "out"))
			code = append(code, m.note(false)...)
			code = append(code,
				asm.FnMapLookupElem.Call(),
				asm.JEq.Imm(asm.R0, 0, "out"))
			code = append(code, m.again()...)
			code = append(code, asm.FnMapDeleteElem.Call())
		}
	}
	return append(code, asm.Mov.Imm(asm.R0, 1).WithSymbol("out"), asm.Return())
}

// sockopsKeeps is that of keeps: the accepted socket marks the note as its own, and
// the last of those that need it takes it away.
func sockopsKeeps(m partMaps) asm.Instructions {
	const taken = 8 // in a note's value
	code := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R7, asm.R6, opsOp, asm.Word),
		asm.JNE.Imm(asm.R7, onTCPConnect, "accept"),
	}
	code = append(code, m.origin()...)
	code = append(code, asm.FnMapLookupElem.Call(), asm.JEq.Imm(asm.R0, 0, "out"))
	code = append(code, m.insert(true)...)
	code = append(code, asm.Ja.Label("out"), asm.JNE.Imm(asm.R7, onPassiveEstablished, "state").WithSymbol("accept"))
	code = append(code, m.note(true)...)
	code = append(code,
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreMem(asm.R0, taken, asm.R1, asm.DWord))
	code = append(code, watchState()...)
	code = append(code,
		asm.Ja.Label("out"),
		asm.JNE.Imm(asm.R7, onState, "out").WithSymbol("state"),
		asm.LoadMem(asm.R1, asm.R6, opsState, asm.Word),
		asm.JNE.Imm(asm.R1, stateClose, "out"),
		asm.LoadMem(asm.R1, asm.R6, opsLocalPort, asm.Word),
		asm.JEq.Imm(asm.R1, proxyPort, "accepted"))
	code = append(code, m.origin()...)
	code = append(code, asm.FnMapDeleteElem.Call())
	code = append(code, m.note(false)...)
	code = append(code,
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R1, asm.R0, taken, asm.DWord),
		asm.JNE.Imm(asm.R1, 0, "out"))
	code = append(code, m.again()...)
	code = append(code, asm.FnMapDeleteElem.Call(), asm.Ja.Label("out"))
	accepted := m.note(true)
	accepted[0] = accepted[0].WithSymbol("accepted")
	code = append(code, accepted...)
	return append(code, asm.FnMapDeleteElem.Call(), asm.Mov.Imm(asm.R0, 1).WithSymbol("out"), asm.Return())
}

// attachPart attaches a path's programs to a pod. It gives what takes them away.
func attachPart(b *testing.B, p *testbed.Pod, by path) (detach func()) {
	b.Helper()
	netns, err := os.Open(p.NetnsPath())
	if err != nil {
		b.Fatal(err)
	}
	defer netns.Close()
	m := newPartMaps(b)
	defer m.close()
	nothing := asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()} // go on
	var closers []io.Closer
	for _, h := range []struct {
		program ebpf.ProgramType
		attach  ebpf.AttachType
		code    asm.Instructions
	}{
		{ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, connectPart(by, m, p.Addr4())},
		{ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect, connectPart(by, m, p.Addr6())},
		{ebpf.SockOps, ebpf.AttachCGroupSockOps, sockopsPart(by, m)},
		{ebpf.CGroupSockopt, ebpf.AttachCGroupGetsockopt, nothing},
		{ebpf.SkLookup, ebpf.AttachSkLookup, nothing},
		{ebpf.SkLookup, ebpf.AttachSkLookup, nothing},
	} {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: "part", Type: h.program, AttachType: h.attach, License: bpf.License, Instructions: h.code,
		})
		if err != nil {
			b.Fatalf("load a program of %s for %v: %+v", by, h.attach, err)
		}
		defer prog.Close()
		var l io.Closer
		if h.program == ebpf.SkLookup {
			l, err = link.AttachNetNs(int(netns.Fd()), prog)
		} else {
			l, err = link.AttachCgroup(link.CgroupOptions{Path: p.CgroupPath(), Attach: h.attach, Program: prog})
		}
		if err != nil {
			b.Fatalf("attach a program of %s to %v: %v", by, h.attach, err)
		}
		closers = append(closers, l)
	}
	return func() {
		for _, c := range closers {
			if err := c.Close(); err != nil {
				b.Errorf("detach a program of %s: %v", by, err)
			}
		}
	}
}

// BenchmarkDataParts says where the time of a redirected connection goes: the paths
// of which each does one thing more, and Shunt's.
func BenchmarkDataParts(b *testing.B) {
	n := newDataNode(b)
	lanes := n.outbound(b, nil, append(append([]path{plain, outside}, parts...), skLookup)...)
	for _, m := range []struct {
		what    string
		measure measurement
	}{
		{"connect", measureConnect},
		{"connect-close", measureConnectClose},
	} {
		for _, family := range families() {
			b.Run(fmt.Sprintf("what=%s/family=%d", m.what, family), func(b *testing.B) {
				n.rounds(b, lanes, family, func(p path) string {
					return fmt.Sprintf("DataParts/what=%s/path=%s/family=%d", m.what, p, family)
				}, m.measure)
			})
		}
	}
}
