// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"

	"shunt.dev/shunt/loader/internal/load"
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
	ErrPermission = load.ErrPermission
	// ErrRefused says that the kernel lacks what the datapath needs. It is
	// conclusive: another attempt would end alike.
	ErrRefused = load.ErrRefused
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
	// ErrNoPrograms says that programs have to be loaded, and that this process has not
	// what that takes. Nothing has been done.
	ErrNoPrograms = errors.New("this process can load no programs")
	// ErrNotAttached says that an attachment has no record.
	ErrNotAttached = errors.New("not attached")
)
