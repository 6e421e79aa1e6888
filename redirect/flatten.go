// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"cmp"
	"math/bits"
	"net/netip"
	"slices"
)

// A PrefixVerdict is an entry of a longest-prefix-match table: the entry that
// is found for an address says by itself which lists the address is in.
type PrefixVerdict struct {
	Prefix           netip.Prefix
	Include, Exclude bool
}

// FlattenPrefixes compiles two lists into such a table: an address is in
// include, or in exclude, exactly if the longest prefix found for it says so;
// none found means neither. No entry says what its nearest ancestor says. The
// prefixes must be those of a Policy (IPv4 never in IPv6-mapped form).
// The order is IPv4 first, then by address, a prefix before those within it.
func FlattenPrefixes(include, exclude []netip.Prefix) []PrefixVerdict {
	all := make([]PrefixVerdict, 0, len(include)+len(exclude))
	for _, p := range include {
		all = append(all, PrefixVerdict{Prefix: p.Masked(), Include: true})
	}
	for _, p := range exclude {
		all = append(all, PrefixVerdict{Prefix: p.Masked(), Exclude: true})
	}
	slices.SortFunc(all, func(a, b PrefixVerdict) int { return a.Prefix.Compare(b.Prefix) })

	// In this order the ancestors of a prefix come before it, nearest last,
	// and what is not an ancestor of one is none of those that follow.
	var (
		flat      []PrefixVerdict
		ancestors []PrefixVerdict
	)
	for i := 0; i < len(all); {
		v := all[i]
		for i++; i < len(all) && all[i].Prefix == v.Prefix; i++ {
			v.Include = v.Include || all[i].Include
			v.Exclude = v.Exclude || all[i].Exclude
		}
		for len(ancestors) > 0 && !ancestors[len(ancestors)-1].Prefix.Contains(v.Prefix.Addr()) {
			ancestors = ancestors[:len(ancestors)-1]
		}
		if len(ancestors) > 0 {
			above := ancestors[len(ancestors)-1]
			v.Include = v.Include || above.Include
			v.Exclude = v.Exclude || above.Exclude
			if v.Include == above.Include && v.Exclude == above.Exclude {
				continue
			}
		}
		ancestors = append(ancestors, v)
		flat = append(flat, v)
	}
	return flat
}

// A PortVerdict is a block of ports that are all in the same lists: those
// whose first Bits bits, in network byte order, are Port's.
type PortVerdict struct {
	Port             uint16 // the block's first port, host byte order; its other bits are 0
	Bits             uint8  // length of the port prefix: 16 is one port, 0 is all of them
	Include, Exclude bool
}

// FlattenPorts compiles two lists into disjoint blocks, in ascending order; a
// port in no block is in neither list. The lists may be in any order and
// overlap.
func FlattenPorts(include, exclude []PortRange) []PortVerdict {
	// A port at which membership of a list begins or, past its end, ceases.
	// In merged ranges no two edges of a list coincide, so each one toggles.
	type edge struct {
		at      uint32
		exclude bool
	}
	var edges []edge
	for _, r := range mergeRanges(include) {
		edges = append(edges, edge{uint32(r.First), false}, edge{uint32(r.Last) + 1, false})
	}
	for _, r := range mergeRanges(exclude) {
		edges = append(edges, edge{uint32(r.First), true}, edge{uint32(r.Last) + 1, true})
	}
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Compare(a.at, b.at) })

	var (
		flat  []PortVerdict
		from  uint32
		state PortVerdict
	)
	for _, e := range edges {
		if state.Include || state.Exclude {
			flat = appendBlocks(flat, from, e.at, state)
		}
		from = e.at
		if e.exclude {
			state.Exclude = !state.Exclude
		} else {
			state.Include = !state.Include
		}
	}
	return flat
}

// appendBlocks cuts the ports from..end-1 into the fewest aligned blocks of a
// power of two.
func appendBlocks(flat []PortVerdict, from, end uint32, flags PortVerdict) []PortVerdict {
	for from < end {
		free := min(bits.TrailingZeros32(from|1<<16), bits.Len32(end-from)-1)
		flags.Port, flags.Bits = uint16(from), uint8(16-free)
		flat = append(flat, flags)
		from += 1 << free
	}
	return flat
}
