// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"net/netip"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/bpf/object"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/internal/load"
)

// TestTraceSwitch: while nobody traces, a decision costs a program one load of a
// word and one branch by it, and no more than that.
func TestTraceSwitch(t *testing.T) {
	const tracingMap = load.TracingMap
	spec, err := object.LoadShunt()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		bpf.ShuntProgShuntConnect4, bpf.ShuntProgShuntConnect6, bpf.ShuntProgShuntSendmsg4, bpf.ShuntProgShuntSendmsg6,
		bpf.ShuntProgShuntSkLookup, bpf.ShuntProgShuntTc,
	} {
		switches, function := 0, ""
		code := spec.Programs[name].Instructions
		for i, ins := range code {
			if s := ins.Symbol(); s != "" {
				function = s
			}
			if ins.Reference() != tracingMap || function == "publish" {
				continue
			}
			switches++
			load := code[i+1]
			if ins.Constant != 0 || load.OpCode != asm.LoadMemOp(asm.DWord) || load.Src != ins.Dst || load.Offset != 0 {
				t.Errorf("%s: %s: %v, %v: want the first word of %s loaded", name, function, ins, load, tracingMap)
			}
			// The compiler may put something else between the two.
			branch := false
			for _, next := range code[i+2 : i+5] {
				op := next.OpCode.JumpOp()
				branch = branch || next.OpCode.Class().IsJump() && (op == asm.JEq || op == asm.JNE) && next.Dst == load.Dst && next.Constant == 0
			}
			if !branch {
				t.Errorf("%s: %s: no branch by the word: %v", name, function, code[i+1:i+5])
			}
		}
		if switches == 0 {
			t.Errorf("%s is not traced", name)
		}
	}
}

// TestDecision: what the programs write is read as it was meant.
func TestDecision(t *testing.T) {
	address := func(s string) (w [4]uint32) {
		*(*[16]byte)(unsafe.Pointer(&w)) = netip.MustParseAddr(s).As16()
		return w
	}
	command := [16]int8{'c', 'u', 'r', 'l', 0, 'x'}
	for _, c := range []struct {
		name  string
		event bpf.ShuntEvent
		want  Decision
	}{
		{
			"outbound, IPv4",
			bpf.ShuntEvent{Cookie: 7, Dport: 80, How: uint32(bpf.ShuntRuleRULE_OUT_INCLUDE_CIDR), Protocol: unix.IPPROTO_TCP, Pid: 4711, Uid: 1000, Gid: 1001, Comm: command},
			Decision{Cookie: 7, Rule: bpf.ShuntRuleRULE_OUT_INCLUDE_CIDR, Protocol: unix.IPPROTO_TCP, Dst: netip.MustParseAddrPort("10.1.2.3:80"), PID: 4711, Command: "curl", UID: 1000, GID: 1001},
		},
		{
			"outbound, refused",
			bpf.ShuntEvent{Cookie: 7, Dport: 80, How: uint32(unix.ENETUNREACH)<<16 | uint32(bpf.ShuntPlacePLACE_CONNECT_NO_SOURCE)<<8 | uint32(bpf.ShuntRuleRULE_OUT_INCLUDE_CIDR)},
			Decision{
				Cookie: 7, Rule: bpf.ShuntRuleRULE_OUT_INCLUDE_CIDR, Dst: netip.MustParseAddrPort("10.1.2.3:80"),
				Failure: &loader.ErrorCount{Cookie: 7, Place: bpf.ShuntPlacePLACE_CONNECT_NO_SOURCE, Errno: unix.ENETUNREACH, Count: 1},
			},
		},
		{
			"inbound, of no process",
			bpf.ShuntEvent{Cookie: 8, Sport: 40000, Dport: 8080, How: uint32(bpf.ShuntRuleRULE_IN_INCLUDE), Protocol: unix.IPPROTO_TCP, Ifindex: 2, Pid: 1, Comm: command},
			Decision{Cookie: 8, Rule: bpf.ShuntRuleRULE_IN_INCLUDE, Protocol: unix.IPPROTO_TCP, Src: netip.MustParseAddrPort("[fd99::9]:40000"), Dst: netip.MustParseAddrPort("10.1.2.3:8080"), Interface: 2},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.event.Time = monotonic() - uint64(time.Hour)
			c.event.Src.W, c.event.Dst.W = address("fd99::9"), address("::ffff:10.1.2.3")
			raw := unsafe.Slice((*byte)(unsafe.Pointer(&c.event)), unsafe.Sizeof(c.event))
			got, err := decision(raw)
			if err != nil {
				t.Fatal(err)
			}
			if age := time.Since(got.Time); age < time.Hour || age > time.Hour+time.Minute {
				t.Errorf("it is %v old, want an hour", age)
			}
			same := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
			if diff := cmp.Diff(c.want, got, same, cmpopts.IgnoreFields(Decision{}, "Time")); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if _, err := decision(raw[:len(raw)-1]); err == nil {
				t.Error("a byte too few is read")
			}
		})
	}
}
