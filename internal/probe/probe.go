// SPDX-License-Identifier: Apache-2.0

// Package probe holds what is found out about a node, as values: a row for
// each thing that a datapath needs, the conclusion from all of them, and how
// both are printed. It looks at nothing itself: packages loader and
// redirect/iptables make the rows, each of what it owns.
package probe

import (
	"fmt"
	"slices"
	"strings"
)

// An Answer is yes, no, or unknown. Only a refusal that another attempt would
// meet again is a no; whatever may be the fault of the attempt is unknown.
type Answer string

// The answers.
const (
	Yes     Answer = "yes"
	No      Answer = "no"
	Unknown Answer = "unknown"
)

// NeedsRoot begins the reason of what could not be told for want of privilege.
const NeedsRoot = "needs root"

// What a row is needed for.
const (
	ForEBPF     = "ebpf"     // every pod of the eBPF datapath
	ForIptables = "iptables" // every pod of the iptables datapath, for this mode and family
	ForTC       = "tc"       // inboundHook tc
	Optional    = "optional" // some pods, or nobody but who reads it
)

// The groups of rows, in the order in which they are shown.
const (
	GroupKernel       = "kernel"
	GroupCapabilities = "capabilities"
	GroupCgroup       = "cgroup"
	GroupBPF          = "bpf"
	GroupTC           = "tc"
	GroupIptables     = "iptables"
)

var groups = []string{GroupKernel, GroupCapabilities, GroupCgroup, GroupBPF, GroupTC, GroupIptables}

// A Row is what was found of one thing. Names are stable.
type Row struct {
	Name   string `json:"name"`
	Group  string `json:"group"`
	Answer Answer `json:"answer"`
	// Why is a sentence that an operator can act on.
	Why string `json:"why"`
	// Since is the mainline kernel that has it first; empty where no version
	// does. docs/PROBE.md names the commits.
	Since     string `json:"since"`
	NeededFor string `json:"neededFor"`
}

// A Check is one connection of the self-test.
type Check struct {
	Path       string `json:"path"` // of Paths
	Connection string `json:"connection"`
	Expected   string `json:"expected"`
	Got        string `json:"got"`
	OK         bool   `json:"ok"`
}

// The paths that a connection can take to the proxy.
const (
	PathEBPF   = "ebpf"
	PathNFT    = "iptables-nft"
	PathLegacy = "iptables-legacy"
)

// Paths are all of them.
var Paths = []string{PathEBPF, PathNFT, PathLegacy}

// A Wish is the netconf's part in the conclusion: the keys of the same names.
type Wish struct {
	Datapath        string // auto, ebpf or iptables
	InboundHook     string // auto, sk_lookup or tc
	IptablesBackend string // auto, nft or legacy
}

// The datapaths of a conclusion.
const (
	EBPF     = "ebpf"
	Iptables = "iptables"
	None     = "none"
	// Unknown stands for itself here too.
)

// Version is that of the JSON form: it changes when a reader would have to.
const Version = 1

// A Report is all that `shunt probe` says.
type Report struct {
	Version int    `json:"version"`
	Kernel  string `json:"kernel"` // its release, as uname has it
	Rows    []Row  `json:"rows"`
	// SelfTest is empty, never null, where none was asked for or no path can
	// be tried.
	SelfTest []Check `json:"selfTest"`
	Datapath string  `json:"datapath"` // ebpf, iptables, none or unknown
	Reason   string  `json:"reason"`
}

// NewReport concludes from rows, which it puts in order, what a default pod
// would get.
func NewReport(kernel string, rows []Row, wish Wish) *Report {
	rows = append([]Row{}, rows...) // never null
	slices.SortStableFunc(rows, func(a, b Row) int { return slices.Index(groups, a.Group) - slices.Index(groups, b.Group) })
	r := &Report{Version: Version, Kernel: kernel, Rows: rows, SelfTest: []Check{}}
	r.Datapath, r.Reason = r.conclude(wish)
	return r
}

// Row finds a row by its name. One that is not there is unknown.
func (r *Report) Row(name string) Row {
	for _, row := range r.Rows {
		if row.Name == name {
			return row
		}
	}
	return Row{Name: name, Answer: Unknown, Why: "it was not looked at"}
}

// Serves says whether a path can be taken here: no if one thing that it needs
// is missing, else unknown if one could not be told. The reason names those.
func (r *Report) Serves(path string) (Answer, string) {
	switch path {
	case PathEBPF:
		return r.all(ForEBPF, func(Row) bool { return true })
	case PathNFT, PathLegacy:
		return r.all(ForIptables, func(row Row) bool {
			// A family that the kernel has not needs no rules.
			return strings.HasPrefix(row.Name, path+"-") &&
				(!strings.HasSuffix(row.Name, "6") || r.Row("ipv6").Answer != No)
		})
	}
	return Unknown, "there is no such path"
}

// all joins the rows that are needed for a purpose, and of which is true.
func (r *Report) all(purpose string, of func(Row) bool) (Answer, string) {
	reasons := map[Answer][]string{}
	for _, row := range r.Rows {
		if row.NeededFor == purpose && of(row) {
			reasons[row.Answer] = append(reasons[row.Answer], row.Name)
		}
	}
	for _, a := range []Answer{No, Unknown} {
		if names := reasons[a]; len(names) > 0 {
			return a, r.because(names)
		}
	}
	if len(reasons[Yes]) == 0 {
		return Unknown, "nothing that it needs was looked at"
	}
	return Yes, ""
}

// because names rows, and tells of the first why.
func (r *Report) because(names []string) string {
	first := r.Row(names[0])
	s := fmt.Sprintf("%s: %s", first.Name, first.Why)
	if len(names) > 1 {
		s += fmt.Sprintf(" (and so %s)", strings.Join(names[1:], ", "))
	}
	return s
}

// conclude says which datapath a pod gets that asks for none and needs nothing
// special, and why.
func (r *Report) conclude(wish Wish) (datapath, reason string) {
	if wish.Datapath == Iptables {
		answer, why := r.iptables(wish)
		switch answer {
		case Yes:
			return Iptables, "datapath iptables is asked for, and " + why
		case No:
			return None, "datapath iptables is asked for, and does not work: " + why
		}
		return string(Unknown), "datapath iptables is asked for: " + why
	}
	ebpf, why := r.Serves(PathEBPF)
	if wish.InboundHook == "tc" && ebpf != No {
		if tc, whyTC := r.all(ForTC, func(Row) bool { return true }); tc != Yes {
			ebpf, why = tc, "inboundHook tc is asked for: "+whyTC
		}
	}
	switch {
	case ebpf == Yes:
		reason := "all that eBPF needs is there"
		if hybrid := r.Row("cgroup-unified"); hybrid.Answer == No {
			reason += "; mind the row cgroup-unified: this host is a hybrid one"
		}
		return EBPF, reason
	case wish.Datapath == EBPF && ebpf == No:
		return None, "datapath ebpf is asked for, and does not work: " + why
	case ebpf == Unknown:
		return string(Unknown), "whether eBPF works could not be told: " + why
	}
	answer, ipt := r.iptables(wish)
	switch answer {
	case Yes:
		return Iptables, "eBPF does not work (" + why + "), but " + ipt
	case No:
		return None, "eBPF does not work (" + why + "), nor does iptables: " + ipt
	}
	return string(Unknown), "eBPF does not work (" + why + "), and whether iptables does could not be told: " + ipt
}

// iptables says whether a mode that is wished for works.
func (r *Report) iptables(wish Wish) (Answer, string) {
	paths := []string{PathNFT, PathLegacy}
	if wish.IptablesBackend == "nft" || wish.IptablesBackend == "legacy" {
		paths = []string{"iptables-" + wish.IptablesBackend}
	}
	result := No
	var reasons []string
	for _, path := range paths {
		answer, why := r.Serves(path)
		if answer == Yes {
			return Yes, path + " does"
		}
		if answer == Unknown {
			result = Unknown
		}
		reasons = append(reasons, why)
	}
	return result, strings.Join(reasons, "; ")
}
