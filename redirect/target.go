// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"net/netip"
)

// An Attachment names one CNI attachment: all that DEL is sure to be given.
type Attachment struct {
	ContainerID string // CNI_CONTAINERID
	IfName      string // CNI_IFNAME
}

// A Target is the pod network namespace that a backend programs.
type Target struct {
	Attachment
	Network string // the CNI network's name
	Netns   string // path of the pod's network namespace
	// Cgroup is the absolute path of the pod's cgroup2 directory; empty when
	// it could not be found, for which NoCgroup is the error.
	Cgroup   string
	NoCgroup error
	Pod      PodRef
	// Hook is where eBPF is to take inbound connections; empty: sk_lookup.
	Hook Hook
	// Running: processes of the pod may run already; their sockets are
	// reckoned with.
	Running bool
	// Addrs are the pod's addresses as prevResult gave them. Empty (a
	// standalone configuration): the backend takes them from the netns.
	Addrs []netip.Addr
}

// PodRef says whose pod it is, for state files, logs and metrics.
type PodRef struct {
	Namespace, Name, UID string
}

// ErrNotProgrammed says that a backend knows nothing of an attachment.
var ErrNotProgrammed = errors.New("nothing is programmed")

// A Backend makes a Policy so in one pod, and undoes it. Every method may be
// repeated, in any order, after a crash at any point.
type Backend interface {
	// Apply programs the target. On error nothing is left programmed.
	Apply(ctx context.Context, t Target, p *Policy) error
	// Check fails where the programming of the target is missing or differs
	// from what Apply made, and names what; with ErrNotProgrammed where Apply
	// made nothing.
	Check(ctx context.Context, t Target) error
	// Remove undoes Apply. It needs neither the netns nor the policy and
	// succeeds when there is nothing to do.
	Remove(ctx context.Context, a Attachment) error
}
