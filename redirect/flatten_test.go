// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFlattenPrefixes(t *testing.T) {
	entry := func(prefix string, include, exclude bool) PrefixVerdict {
		return PrefixVerdict{netip.MustParsePrefix(prefix), include, exclude}
	}
	for _, tc := range []struct {
		name             string
		include, exclude []netip.Prefix
		want             []PrefixVerdict
	}{
		{"nothing", nil, nil, nil},
		{"one", prefixes("10.0.0.0/8"), nil, []PrefixVerdict{entry("10.0.0.0/8", true, false)}},
		{"exclude within include", prefixes("10.0.0.0/8"), prefixes("10.1.0.0/16"), []PrefixVerdict{
			entry("10.0.0.0/8", true, false), entry("10.1.0.0/16", true, true),
		}},
		{"include within exclude stays excluded", prefixes("10.1.0.0/16"), prefixes("10.0.0.0/8"), []PrefixVerdict{
			entry("10.0.0.0/8", false, true), entry("10.1.0.0/16", true, true),
		}},
		{"both in one", prefixes("10.0.0.0/8"), prefixes("10.0.0.0/8"), []PrefixVerdict{entry("10.0.0.0/8", true, true)}},
		{"covered entries go", prefixes("10.0.0.0/8", "10.1.0.0/16", "10.1.1.1/32", "10.2.0.0/16"), nil, []PrefixVerdict{entry("10.0.0.0/8", true, false)}},
		{"covered by an ancestor further up", prefixes("10.0.0.0/8", "10.1.1.0/24"), prefixes("10.1.0.0/16"), []PrefixVerdict{
			entry("10.0.0.0/8", true, false), entry("10.1.0.0/16", true, true),
		}},
		{"siblings", prefixes("10.0.0.0/9", "10.128.0.0/9"), nil, []PrefixVerdict{
			entry("10.0.0.0/9", true, false), entry("10.128.0.0/9", true, false),
		}},
		{"families are apart", prefixes("::/0", "0.0.0.0/0"), prefixes("::/0", "1.0.0.0/8"), []PrefixVerdict{
			entry("0.0.0.0/0", true, false), entry("1.0.0.0/8", true, true), entry("::/0", true, true),
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, FlattenPrefixes(tc.include, tc.exclude), netips); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// lookup is a longest-prefix match.
func lookup(table []PrefixVerdict, addr netip.Addr) PrefixVerdict {
	best := PrefixVerdict{Prefix: netip.PrefixFrom(addr, -1)}
	for _, v := range table {
		if v.Prefix.Contains(addr) && v.Prefix.Bits() > best.Prefix.Bits() {
			best = v
		}
	}
	return best
}

func TestFlattenPrefixesProperties(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	// Few bits vary, so that prefixes nest.
	addr := func() netip.Addr {
		if r.IntN(2) == 0 {
			return netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(64))})
		}
		return netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(r.IntN(64))})
	}
	list := func() []netip.Prefix {
		var out []netip.Prefix
		for range r.IntN(12) {
			a := addr()
			bits := a.BitLen() - r.IntN(8)
			if r.IntN(20) == 0 {
				bits = 0
			}
			out = append(out, netip.PrefixFrom(a, bits)) // host bits and all
		}
		return out
	}
	for range 500 {
		include, exclude := list(), list()
		table := FlattenPrefixes(include, exclude)
		for range 64 {
			a := addr()
			got := lookup(table, a)
			if got.Include != containsAddr(include, a) || got.Exclude != containsAddr(exclude, a) {
				t.Fatalf("%v: %+v\ninclude %v\nexclude %v\ntable %+v", a, got, include, exclude, table)
			}
		}
		// Minimal: none says what would be found without it.
		for i, v := range table {
			if v.Prefix != v.Prefix.Masked() || i > 0 && table[i-1].Prefix.Compare(v.Prefix) >= 0 {
				t.Fatalf("table %+v: not sorted, or not masked", table)
			}
			for j := i - 1; ; j-- {
				var above PrefixVerdict
				if j >= 0 {
					above = table[j]
					if !above.Prefix.Contains(v.Prefix.Addr()) {
						continue
					}
				}
				if v.Include == above.Include && v.Exclude == above.Exclude {
					t.Fatalf("table %+v: %v is not needed", table, v.Prefix)
				}
				break
			}
		}
	}
}

func TestFlattenPorts(t *testing.T) {
	for _, tc := range []struct {
		name             string
		include, exclude []PortRange
		want             []PortVerdict
	}{
		{"nothing", nil, nil, nil},
		{"one port", ports(80, 80), nil, []PortVerdict{{80, 16, true, false}}},
		{"all", ports(0, 65535), nil, []PortVerdict{{0, 0, true, false}}},
		{"the last", ports(65535, 65535), nil, []PortVerdict{{65535, 16, true, false}}},
		{"the upper half", nil, ports(32768, 65535), []PortVerdict{{32768, 1, false, true}}},
		{"80-90", ports(80, 90), nil, []PortVerdict{{80, 13, true, false}, {88, 15, true, false}, {90, 16, true, false}}},
		{"exclude within include", ports(80, 83), ports(82, 82), []PortVerdict{
			{80, 15, true, false}, {82, 16, true, true}, {83, 16, true, false},
		}},
		{"the same in both", ports(8, 15), ports(8, 15), []PortVerdict{{8, 13, true, true}}},
		{"end to end", ports(8, 15), ports(16, 31), []PortVerdict{{8, 13, true, false}, {16, 12, false, true}}},
		{"any order, overlapping", ports(6, 7, 4, 6), nil, []PortVerdict{{4, 14, true, false}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, FlattenPorts(tc.include, tc.exclude)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestFlattenPortsProperties(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	list := func() []PortRange {
		var out []PortRange
		for range r.IntN(8) {
			first := r.IntN(65536)
			out = append(out, PortRange{uint16(first), uint16(min(65535, first+r.IntN(1<<r.IntN(17))))})
		}
		return out
	}
	for range 50 {
		include, exclude := list(), list()
		table := FlattenPorts(include, exclude)
		var got [65536]PortVerdict
		end := 0
		for _, v := range table {
			size := 1 << (16 - v.Bits)
			if v.Bits > 16 || int(v.Port)%size != 0 || int(v.Port) < end || !v.Include && !v.Exclude {
				t.Fatalf("%+v in %+v: not aligned, not in order, or of no list", v, table)
			}
			end = int(v.Port) + size
			for port := int(v.Port); port < end; port++ {
				got[port] = v
			}
		}
		for port, v := range got {
			if v.Include != containsPort(include, uint16(port)) || v.Exclude != containsPort(exclude, uint16(port)) {
				t.Fatalf("port %d: %+v\ninclude %v\nexclude %v", port, v, include, exclude)
			}
		}
		// Fewest: no block could be one with the next.
		for i := 1; i < len(table); i++ {
			a, b := table[i-1], table[i]
			if a.Bits == b.Bits && a.Include == b.Include && a.Exclude == b.Exclude &&
				int(b.Port)-int(a.Port) == 1<<(16-a.Bits) && int(a.Port)%(2<<(16-a.Bits)) == 0 {
				t.Fatalf("%+v and %+v are one block", a, b)
			}
		}
	}
}

func TestFlattenLeavesItsArguments(t *testing.T) {
	ranges, list := ports(6, 7, 4, 6), prefixes("10.1.0.0/16", "10.0.0.0/8")
	FlattenPorts(ranges, ranges)
	FlattenPrefixes(list, list)
	if diff := cmp.Diff(ports(6, 7, 4, 6), ranges); diff != "" {
		t.Errorf("ports (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(prefixes("10.1.0.0/16", "10.0.0.0/8"), list, netips); diff != "" {
		t.Errorf("prefixes (-want +got):\n%s", diff)
	}
}

// A table of 10,000 prefixes is compiled while a pod waits.
func BenchmarkFlattenPrefixes(b *testing.B) {
	r := rand.New(rand.NewPCG(7, 8))
	var include, exclude []netip.Prefix
	for range 5000 {
		a := netip.AddrFrom4([4]byte{10, byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32())})
		include = append(include, netip.PrefixFrom(a, 8+r.IntN(25)).Masked())
		exclude = append(exclude, netip.PrefixFrom(a, 8+r.IntN(25)).Masked())
	}
	for b.Loop() {
		FlattenPrefixes(include, exclude)
	}
}

func BenchmarkEvaluate(b *testing.B) {
	c, pod := DefaultConfig(), meshed()
	for b.Loop() {
		if _, _, err := c.Evaluate(pod); err != nil {
			b.Fatal(err)
		}
	}
}
