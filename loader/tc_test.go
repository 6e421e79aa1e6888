// SPDX-License-Identifier: Apache-2.0

//go:build linux

package loader

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cebpf "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
)

// attachBy is attach with an inbound hook.
func attachBy(t testing.TB, opts Options, p *testbed.Pod, hook InboundHook) error {
	t.Helper()
	ns, err := OpenNetns(p.NetnsPath())
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	d, err := Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	return d.Attach(Target{ID: podID(p), Network: "test", Netns: ns, Cgroup: p.CgroupPath(), InboundHook: hook}, testRules(p))
}

func filtersAt(t testing.TB, p *testbed.Pod, name string) int {
	t.Helper()
	l, err := p.Netlink().LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	list, err := p.Netlink().FilterList(l, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// The record keeps all of its fields, and one of before there was a choice of
// hooks is read.
func TestRecordInboundHook(t *testing.T) {
	for _, r := range []Record{
		{Build: "b"},
		{Build: "b", InboundHook: SkLookup},
		{
			Build: "b", InboundHook: TC,
			Interfaces: []TCInterface{{Index: 2, Name: "eth0"}, {Index: 3, Name: `"odd"`, Filter: true}},
			Leaving:    []TCInterface{{Index: 2, Name: "eth0", Filter: true}},
		},
	} {
		r.Rules.Dests, r.Rules.Ports = []Dest{}, []Port{}
		var got Record
		if err := json.Unmarshal(r.encode(), &got); err != nil {
			t.Fatalf("%s: %v", r.encode(), err)
		}
		if diff := cmp.Diff(r, got, cmp.Comparer(func(a, b Rules) bool { return a.UID == b.UID })); diff != "" {
			t.Errorf("(-written +read):\n%s", diff)
		}
	}
}

// Whatever an Attach that was killed has left, Remove takes away, and the next
// Attach completes.
func TestPrivilegedTCInterrupted(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, noTCX := range []bool{false, true} {
		opts, p := node(t), testbed.NewPod(t)
		opts.NoTCX = noTCX
		for _, goOn := range []bool{false, true} {
			for _, x := range []struct {
				name string
				do   func(d *Datapath, r *Record, n *Netns) error
			}{
				{"record", func(d *Datapath, r *Record, n *Netns) error { return d.writeRecord(r) }},
				{"record and links", func(d *Datapath, r *Record, n *Netns) error {
					return errors.Join(d.writeRecord(r), d.linkTC(r, n))
				}},
				{"both hooks", func(d *Datapath, r *Record, n *Netns) error {
					r.InboundHook, r.Interfaces, r.Leaving = SkLookup, nil, r.Interfaces
					return errors.Join(d.writeRecord(r), d.linkTC(&Record{Cookie: r.Cookie, Interfaces: r.Leaving}, n), d.linkNetns(r, n.fd))
				}},
				{"a pin between names", func(d *Datapath, r *Record, n *Netns) error {
					err := errors.Join(d.writeRecord(r), d.linkTC(r, n))
					for _, i := range r.Interfaces {
						if path := tcLinkPath(d.netnsLinks(r.Cookie), i); err == nil && !i.Filter {
							err = os.Rename(path, path+"-new")
						}
					}
					return err
				}},
			} {
				if err := attachBy(t, opts, p, TC); err != nil {
					t.Fatal(err)
				}
				func() {
					ns, err := OpenNetns(p.NetnsPath())
					if err != nil {
						t.Fatal(err)
					}
					defer ns.Close()
					d, err := Open(t.Context(), opts)
					if err != nil {
						t.Fatal(err)
					}
					defer d.Close()
					r, err := d.readRecord(podID(p))
					if err != nil {
						t.Fatal(err)
					}
					if err := d.unlinkAllTC(r); err != nil {
						t.Fatal(err)
					}
					if err := x.do(d, r, ns); err != nil {
						t.Fatalf("%s: %v", x.name, err)
					}
				}()
				if goOn {
					if err := attachBy(t, opts, p, SkLookup); err != nil {
						t.Fatalf("%s: %v", x.name, err)
					}
					if err := Check(t.Context(), opts, podID(p)); err != nil {
						t.Errorf("%s: check: %v", x.name, err)
					}
					if n := filtersAt(t, p, "eth0"); n != 0 {
						t.Errorf("%s: %d filters are left", x.name, n)
					}
				}
				mustRemove(t, opts, p)
				if n := filtersAt(t, p, "eth0"); n != 0 {
					t.Errorf("%s: %d filters are left after the removal", x.name, n)
				}
				nothingLeft(t, opts)
			}
		}
	}
}

// An unknown hook, or somebody else's filter in the place of ours, is an error,
// and nothing is left.
func TestPrivilegedTCRefused(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	if err := attachBy(t, opts, p, "netfilter"); err == nil || !strings.Contains(err.Error(), `"netfilter"`) {
		t.Errorf("an unknown hook: %v", err)
	}
	nothingLeft(t, opts)

	opts.NoTCX = true
	eth0, err := p.Netlink().LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Netlink().QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: eth0.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}); err != nil {
		t.Fatal(err)
	}
	other, err := cebpf.NewProgram(&cebpf.ProgramSpec{
		Type: cebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	theirs := ours(TCInterface{Index: uint32(eth0.Attrs().Index)}, fd(other.FD()))
	theirs.Name = "theirs"
	if err := p.Netlink().FilterAdd(theirs); err != nil {
		t.Fatal(err)
	}
	if err := attachBy(t, opts, p, TC); !errors.Is(err, errForeignFilter) || !strings.Contains(err.Error(), "eth0") {
		t.Errorf("somebody else's filter has the place: %v", err)
	}
	if n := filtersAt(t, p, "eth0"); n != 1 {
		t.Errorf("%d filters, want the other one", n)
	}
	nothingLeft(t, opts)
}

// What the programs count is read, by pod and place.
func TestPrivilegedErrors(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	if got, err := Errors(opts); len(got) != 0 || err != nil {
		t.Errorf("without a datapath: %v, %v", got, err)
	}
	mustAttach(t, opts, p, testRules(p))
	m, err := cebpf.LoadPinnedMap(filepath.Join(opts.BPFDir, "datapath-"+bpf.Digest[:16], bpf.ShuntMapErrors), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	key := bpf.ShuntErrorKey{Cookie: p.NetnsCookie(t), Place: uint32(bpf.ShuntPlacePLACE_LISTENER_REGISTER), Error: uint32(unix.EOPNOTSUPP)}
	if err := m.Put(key, uint64(3)); err != nil {
		t.Fatal(err)
	}
	want := []ErrorCount{{p.NetnsCookie(t), bpf.ShuntPlacePLACE_LISTENER_REGISTER, unix.EOPNOTSUPP, 3}}
	got, err := Errors(opts)
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("(-want +got):\n%s%v", diff, err)
	}
	for _, w := range []string{"inboundHook tc", "3 times", "operation not supported"} {
		if s := got[0].String(); !strings.Contains(s, w) {
			t.Errorf("%q doesn't say %q", s, w)
		}
	}
	mustRemove(t, opts, p)
}

// Each place has its sentence.
func TestPlaces(t *testing.T) {
	for p := bpf.ShuntPlacePLACE_NONE + 1; p < bpf.ShuntPlacePLACE_COUNT; p++ {
		if places[p].text == "" {
			t.Errorf("place %d has none", p)
		}
	}
}
