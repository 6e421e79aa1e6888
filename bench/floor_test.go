// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
)

// floorName is the record's of what programming a pod can't be had without.
const floorName = "Setup/op=add/path=floor/family=dual/policy=small"

// A floor has the node's objects open, which no process of the plugin has.
type floor struct {
	objects map[string]uint32 // descriptors, by name
	links   []floorLink
	dir     string
}

type floorLink struct {
	program string
	attach  ebpf.AttachType
	netns   bool
}

// newFloor opens what the way of the record's first path has loaded.
func (l *ledger) newFloor(n *node) *floor {
	l.Helper()
	datapath, err := filepath.Glob(filepath.Join(n.bpfDir, "datapath-*"))
	if err != nil || len(datapath) != 1 {
		l.Fatalf("datapaths of the node: %v, %v", datapath, err)
	}
	f := &floor{
		objects: map[string]uint32{},
		links: []floorLink{
			{bpf.ShuntProgShuntSockops, ebpf.AttachCGroupSockOps, false},
			{bpf.ShuntProgShuntGetsockopt, ebpf.AttachCGroupGetsockopt, false},
			{bpf.ShuntProgShuntGetpeername4, ebpf.AttachCgroupInet4GetPeername, false},
			{bpf.ShuntProgShuntGetpeername6, ebpf.AttachCgroupInet6GetPeername, false},
			{bpf.ShuntProgShuntConnect4, ebpf.AttachCGroupInet4Connect, false},
			{bpf.ShuntProgShuntConnect6, ebpf.AttachCGroupInet6Connect, false},
			{bpf.ShuntProgShuntSkLookup, ebpf.AttachSkLookup, true},
			{bpf.ShuntProgShuntSkLookup, ebpf.AttachSkLookup, true},
		},
		dir: filepath.Join(n.bpfDir, "floor"),
	}
	for _, link := range f.links {
		f.objects[link.program] = 0
	}
	for _, name := range []string{bpf.ShuntMapDests, bpf.ShuntMapPorts, bpf.ShuntMapStates, bpf.ShuntMapPods} {
		f.objects[name] = 0
	}
	for name := range f.objects {
		pin, _ := unix.BytePtrFromString(filepath.Join(datapath[0], name))
		object, err := bare(unix.BPF_OBJ_GET, pinAttr{path: pin})
		if err != nil {
			l.Fatalf("open %s: %v", name, err)
		}
		f.objects[name] = object
		l.Cleanup(func() { unix.Close(int(object)) })
	}
	return f
}

// floor does to a pod, by bare system calls, no more than makes it redirected by
// these programs, with all of them open already: it finds the namespace's cookie,
// writes the entries of its policy and makes the links, each with a pin so that it
// outlives the process. There is no lock and no record, nobody looks for what was
// there before, and no error has a name. Nothing that keeps a pod redirected by
// eBPF can take less: it is what the times of the ways are to be held against.
func (l *ledger) floor(f *floor, p *testbed.Pod) {
	l.Helper()
	pins := make([]*byte, len(f.links))
	for i := range pins {
		pins[i], _ = unix.BytePtrFromString(fmt.Sprintf("%s/%d", f.dir, i))
	}
	start := time.Now()
	cookie, err := f.program(p, pins)
	took := time.Since(start)
	if err := errors.Join(f.entries(unix.BPF_MAP_DELETE_ELEM, cookie), os.RemoveAll(f.dir)); err != nil {
		l.Fatalf("undo %s: %v", floorName, err)
	}
	if err != nil {
		l.Fatalf("%s: %v", floorName, err)
	}
	l.add(floorName, took)
}

func (f *floor) program(p *testbed.Pod, pins []*byte) (cookie uint64, err error) {
	netns, err := unix.Open(p.NetnsPath(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(netns)
	err = p.Do(func() error {
		s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		cookie, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	})
	if err != nil {
		return 0, err
	}
	cgroup, err := unix.Open(p.CgroupPath(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return cookie, err
	}
	defer unix.Close(cgroup)
	if err := f.entries(unix.BPF_MAP_UPDATE_ELEM, cookie); err != nil {
		return cookie, err
	}
	if err := unix.Mkdir(f.dir, 0o700); err != nil {
		return cookie, err
	}
	for i, l := range f.links {
		target := cgroup
		if l.netns {
			target = netns
		}
		link, err := bare(unix.BPF_LINK_CREATE, linkAttr{program: f.objects[l.program], target: uint32(target), attach: uint32(l.attach)})
		if err != nil {
			return cookie, fmt.Errorf("link %s: %w", l.program, err)
		}
		if _, err := bare(unix.BPF_OBJ_PIN, pinAttr{path: pins[i], object: link}); err != nil {
			return cookie, err
		}
		unix.Close(int(link))
	}
	return cookie, nil
}

// entries writes, or deletes, as many entries as a default pod has.
func (f *floor) entries(cmd int, cookie uint64) error {
	half := [2]uint32{uint32(cookie), uint32(cookie >> 32)}
	var (
		dest  bpf.ShuntDest
		port  uint32
		state bpf.ShuntPodState
		pod   bpf.ShuntPod
		errs  []error
	)
	each := func(name string, key, value unsafe.Pointer) {
		if cmd == unix.BPF_MAP_DELETE_ELEM {
			value = nil
		}
		_, err := bare(cmd, elemAttr{object: f.objects[name], key: key, value: value})
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	for i := range uint32(3) {
		key := bpf.ShuntDestKey{Prefixlen: 64 + 32, Cookie: half}
		key.Addr.W[0] = i
		each(bpf.ShuntMapDests, unsafe.Pointer(&key), unsafe.Pointer(&dest))
	}
	key := bpf.ShuntPortKey{Prefixlen: 64 + 16, Cookie: half}
	each(bpf.ShuntMapPorts, unsafe.Pointer(&key), unsafe.Pointer(&port))
	each(bpf.ShuntMapStates, unsafe.Pointer(&cookie), unsafe.Pointer(&state))
	each(bpf.ShuntMapPods, unsafe.Pointer(&cookie), unsafe.Pointer(&pod))
	return errors.Join(errs...)
}

// The kernel's bpf_attr, as far as it is needed here.
type (
	pinAttr struct {
		path   *byte
		object uint32
		_      uint32
	}
	linkAttr struct {
		program, target, attach, _ uint32
		_                          [4]uint64
	}
	elemAttr struct {
		object     uint32
		_          uint32
		key, value unsafe.Pointer
		_          uint64
	}
)

// bare makes a bpf(2) call and nothing else.
func bare[T any](cmd int, attr T) (uint32, error) {
	r, _, errno := unix.RawSyscall(unix.SYS_BPF, uintptr(cmd), uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return 0, errno
	}
	return uint32(r), nil
}
