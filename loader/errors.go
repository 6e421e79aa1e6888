// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// What a caller may want to tell apart, besides what the kernel said.
var (
	// ErrNoCgroup2 says that no cgroup2 file system is mounted.
	ErrNoCgroup2 = errors.New("no cgroup2")
	// ErrNoPodCgroup says that a pod's cgroup was not found: programs can't be
	// attached to it.
	ErrNoPodCgroup = errors.New("no cgroup of the pod")
	// ErrNoBPFFS says that there is no place for pins.
	ErrNoBPFFS = errors.New("no bpffs")
	// ErrPermission says that the kernel does not let this process use BPF.
	ErrPermission = errors.New("no permission")
	// ErrRefused says that the kernel lacks what the datapath needs. It is
	// conclusive: another attempt would end alike.
	ErrRefused = errors.New("the kernel refuses the datapath")
	// ErrAttach says that a program could not be attached to a pod.
	ErrAttach = errors.New("attach")
	// ErrListener says that a listener of a running pod's proxy could not be
	// registered.
	ErrListener = errors.New("register the proxy's listener")
	// ErrInterfaces says that it can't be told by which of its interfaces a pod's
	// connections leave, and one is excluded.
	ErrInterfaces = errors.New("its interfaces can't be excluded by eBPF")
	// ErrFull says that a map is full: a policy is never cut short.
	ErrFull = errors.New("the map is full with the entries of this node's pods")
	// ErrOtherBuild says that a pod has programs of another build of Shunt, which
	// this build's can't take the place of.
	ErrOtherBuild = errors.New("the pod's programs are of another build of shunt")
	// ErrNotUndone says that something of a failed attachment may be left.
	ErrNotUndone = errors.New("not undone")
	// ErrNotAttached says that an attachment has no record.
	ErrNotAttached = errors.New("not attached")
)

// mayLoad reports whether this process has the capabilities that loading needs.
// Without them an error may look like a missing feature: cilium/ebpf tries out
// what the kernel has, and takes any refusal for a no.
func mayLoad() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	effective := uint64(data[0].Effective) | uint64(data[1].Effective)<<32
	has := func(c int) bool { return effective&(1<<c) != 0 }
	return has(unix.CAP_NET_ADMIN) && (has(unix.CAP_SYS_ADMIN) || has(unix.CAP_BPF) && has(unix.CAP_PERFMON))
}

// classify says what it means that the kernel did not load the datapath.
func classify(err error) error {
	// EACCES is the verifier's, who says why, or a security module's, who doesn't.
	var verifier *ebpf.VerifierError
	byModule := errors.Is(err, unix.EACCES) && !(errors.As(err, &verifier) && len(verifier.Log) > 0)
	switch {
	case errors.Is(err, unix.EPERM), byModule, !mayLoad():
		return fmt.Errorf("%w: %w (CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or CAP_SYS_ADMIN, are needed)", ErrPermission, err)
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EACCES),
		errors.Is(err, unix.E2BIG), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return err
}
