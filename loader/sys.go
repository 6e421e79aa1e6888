// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The bpf(2) calls of the pod-start path, as thin as they can be: a pod costs
// some thirty of them, in a process that lives for a few milliseconds.
// What loads the programs goes through cilium/ebpf. Pointers in the attributes are
// unsafe.Pointers, so that the collector and moving stacks see them: this is for
// 64-bit machines.

// All but the load of a program are too short for the scheduler to be told of
// them: that would cost more than they do.
func syscallBPF(cmd int, attr unsafe.Pointer, size uintptr) (int, error) {
	call := unix.RawSyscall
	if cmd == unix.BPF_PROG_LOAD {
		call = unix.Syscall
	}
	for {
		r, _, errno := call(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
		switch errno {
		case 0:
			return int(r), nil
		case unix.EINTR, unix.EAGAIN: // EAGAIN: the verifier was interrupted by a signal
			continue
		default:
			return -1, errno
		}
	}
}

// An fd is a file descriptor of a kernel object, -1 when there is none.
type fd int

func (f fd) close() {
	if f >= 0 {
		unix.Close(int(f))
	}
}

type objAttr struct {
	path  unsafe.Pointer
	fd    uint32
	flags uint32
}

// getPin opens a pinned object.
func getPin(path string) (fd, error) { return openPin(path, 0) }

// getPinToRead opens a pinned map that is not to be changed.
func getPinToRead(path string) (fd, error) { return openPin(path, unix.BPF_F_RDONLY) }

func openPin(path string, flags uint32) (fd, error) {
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	attr := objAttr{path: unsafe.Pointer(p), flags: flags}
	f, err := syscallBPF(unix.BPF_OBJ_GET, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return -1, &os.PathError{Op: "open pin", Path: path, Err: err}
	}
	return fd(f), nil
}

// pin gives an object a name in bpffs.
func (f fd) pin(path string) error {
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	attr := objAttr{path: unsafe.Pointer(p), fd: uint32(f)}
	_, err = syscallBPF(unix.BPF_OBJ_PIN, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return &os.PathError{Op: "pin", Path: path, Err: err}
	}
	return nil
}

type testRunAttr struct {
	progFD   uint32
	ret      uint32
	sizeIn   uint32
	sizeOut  uint32
	dataIn   unsafe.Pointer
	dataOut  unsafe.Pointer
	repeat   uint32
	duration uint32
	_        [8]uint32
}

// testRun runs a program for packets once, on one that says nothing, in the
// network namespace of the thread.
func testRun(prog fd) (ret uint32, err error) {
	return testRunOn(prog, make([]byte, 64))
}

// testRunOn is testRun with the packet given.
func testRunOn(prog fd, packet []byte) (ret uint32, err error) {
	attr := testRunAttr{progFD: uint32(prog), sizeIn: uint32(len(packet)), dataIn: unsafe.Pointer(unsafe.SliceData(packet))}
	_, err = syscallBPF(unix.BPF_PROG_TEST_RUN, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return attr.ret, err
}

type elemAttr struct {
	mapFD uint32
	_     uint32
	key   unsafe.Pointer
	value unsafe.Pointer
	flags uint64
}

// Flags of update.
const (
	updateAny     = unix.BPF_ANY
	updateNoExist = unix.BPF_NOEXIST
)

// update, lookup and remove take keys and values of the generated types, which
// are laid out as the kernel has them.

func update[K, V any](m fd, key *K, value *V, flags uint64) error {
	attr := elemAttr{mapFD: uint32(m), key: unsafe.Pointer(key), value: unsafe.Pointer(value), flags: flags}
	_, err := syscallBPF(unix.BPF_MAP_UPDATE_ELEM, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return err
}

func lookup[K, V any](m fd, key *K, value *V) error {
	attr := elemAttr{mapFD: uint32(m), key: unsafe.Pointer(key), value: unsafe.Pointer(value)}
	_, err := syscallBPF(unix.BPF_MAP_LOOKUP_ELEM, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return err
}

// remove deletes a key; a key that is not there is no error.
func remove[K any](m fd, key *K) error {
	attr := elemAttr{mapFD: uint32(m), key: unsafe.Pointer(key)}
	_, err := syscallBPF(unix.BPF_MAP_DELETE_ELEM, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// eachKey calls fn with every key of a hash map. Where others change the map
// meanwhile, the kernel may begin anew, and keys come twice; limit bounds that.
func eachKey[K any](m fd, limit int, fn func(key *K)) error {
	var prev *K
	for range limit {
		next := new(K)
		attr := elemAttr{mapFD: uint32(m), key: unsafe.Pointer(prev), value: unsafe.Pointer(next)}
		_, err := syscallBPF(unix.BPF_MAP_GET_NEXT_KEY, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("list a map: %w", err)
		}
		fn(next)
		prev = next
	}
	return errMapChanges
}

// errMapChanges: others change a map so much that its end is not come to.
var errMapChanges = errors.New("list a map: it changes all the time")

type progLoadAttr struct {
	progType           uint32
	insnCount          uint32
	insns              unsafe.Pointer
	license            unsafe.Pointer
	logLevel           uint32
	logSize            uint32
	logBuf             unsafe.Pointer
	kernVersion        uint32
	flags              uint32
	name               [unix.BPF_OBJ_NAME_LEN]byte
	ifindex            uint32
	expectedAttachType uint32
}

// loadProgram loads prepared instructions. When the verifier refuses them, it
// is asked again for its reasons, which go into the error.
func loadProgram(typ uint32, attach attachType, name, license string, code []byte) (fd, error) {
	lic := append([]byte(license), 0)
	attr := progLoadAttr{
		progType:           typ,
		insnCount:          uint32(len(code) / 8),
		insns:              unsafe.Pointer(unsafe.SliceData(code)),
		license:            unsafe.Pointer(unsafe.SliceData(lic)),
		expectedAttachType: uint32(attach),
	}
	copy(attr.name[:len(attr.name)-1], name)
	f, err := syscallBPF(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil && !errors.Is(err, unix.EPERM) {
		log := make([]byte, 64<<10)
		attr.logLevel, attr.logSize, attr.logBuf = 1, uint32(len(log)), unsafe.Pointer(unsafe.SliceData(log))
		var again error
		if f, again = syscallBPF(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); again == nil {
			err = nil
		} else {
			err = fmt.Errorf("%w: %s", err, lastLine(log))
		}
	}
	if err != nil {
		return -1, fmt.Errorf("load program %s: %w", name, err)
	}
	return fd(f), nil
}

// lastLine gives the last line of a verifier's log that says anything.
func lastLine(log []byte) string {
	end := 0
	for end < len(log) && log[end] != 0 {
		end++
	}
	lines := strings.Split(string(log[:end]), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if l := lines[i]; l != "" && !strings.HasPrefix(l, "processed ") {
			return l
		}
	}
	return "the verifier says nothing"
}

// An attachType says where a program is attached: enum bpf_attach_type.
type attachType uint32

// Those of a pod's.
const (
	attachSockOps      attachType = unix.BPF_CGROUP_SOCK_OPS
	attachGetsockopt   attachType = unix.BPF_CGROUP_GETSOCKOPT
	attachConnect4     attachType = unix.BPF_CGROUP_INET4_CONNECT
	attachConnect6     attachType = unix.BPF_CGROUP_INET6_CONNECT
	attachGetpeername4 attachType = unix.BPF_CGROUP_INET4_GETPEERNAME
	attachGetpeername6 attachType = unix.BPF_CGROUP_INET6_GETPEERNAME
	attachUDP4Recvmsg  attachType = unix.BPF_CGROUP_UDP4_RECVMSG
	attachUDP6Recvmsg  attachType = unix.BPF_CGROUP_UDP6_RECVMSG
	attachUDP4Sendmsg  attachType = unix.BPF_CGROUP_UDP4_SENDMSG
	attachUDP6Sendmsg  attachType = unix.BPF_CGROUP_UDP6_SENDMSG
	attachSkLookup     attachType = unix.BPF_SK_LOOKUP
	attachTCXIngress   attachType = unix.BPF_TCX_INGRESS
)

// String names it as cilium/ebpf and its users do.
func (a attachType) String() string {
	switch a {
	case attachSockOps:
		return "CGroupSockOps"
	case attachGetsockopt:
		return "CGroupGetsockopt"
	case attachConnect4:
		return "CGroupInet4Connect"
	case attachConnect6:
		return "CGroupInet6Connect"
	case attachGetpeername4:
		return "CgroupInet4GetPeername"
	case attachGetpeername6:
		return "CgroupInet6GetPeername"
	case attachUDP4Recvmsg:
		return "CGroupUDP4Recvmsg"
	case attachUDP6Recvmsg:
		return "CGroupUDP6Recvmsg"
	case attachUDP4Sendmsg:
		return "CGroupUDP4Sendmsg"
	case attachUDP6Sendmsg:
		return "CGroupUDP6Sendmsg"
	case attachSkLookup:
		return "SkLookup"
	case attachTCXIngress:
		return "TCXIngress"
	}
	return "AttachType(" + strconv.FormatUint(uint64(a), 10) + ")"
}

type linkCreateAttr struct {
	progFD     uint32
	targetFD   uint32
	attachType uint32
	flags      uint32
	_          [4]uint64
}

// createLink attaches a program. It never falls back to BPF_PROG_ATTACH, whose
// override mode would switch other people's programs off: links to cgroups are
// always of the multi kind.
func createLink(prog, target fd, attach attachType) (fd, error) {
	attr := linkCreateAttr{progFD: uint32(prog), targetFD: uint32(target), attachType: uint32(attach)}
	f, err := syscallBPF(unix.BPF_LINK_CREATE, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return -1, fmt.Errorf("%w %v: %w", ErrAttach, attach, err)
	}
	return fd(f), nil
}

// update has a link run another program of the same type, from one packet or call to
// the next. One whose target is gone runs none, and stays as it is.
func (f fd) update(prog fd) error {
	attr := struct{ link, prog, flags, old uint32 }{link: uint32(f), prog: uint32(prog)}
	_, err := syscallBPF(unix.BPF_LINK_UPDATE, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if errors.Is(err, unix.ENOLINK) {
		return nil
	}
	return err
}

// query lists the programs that are attached to a cgroup or network namespace
// itself, in the order in which they run.
func query(target fd, attach attachType) ([]uint32, error) {
	ids := make([]uint32, 64) // a cgroup holds no more (BPF_CGROUP_MAX_PROGS)
	attr := struct {
		target, attach, flags, attachFlags uint32
		ids                                unsafe.Pointer
		count, _                           uint32
		_                                  [4]uint64
	}{target: uint32(target), attach: uint32(attach), ids: unsafe.Pointer(unsafe.SliceData(ids)), count: uint32(len(ids))}
	if _, err := syscallBPF(unix.BPF_PROG_QUERY, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil {
		return nil, err
	}
	return ids[:attr.count], nil
}

// detach takes a link off its target, which may be gone already.
func (f fd) detach() error {
	attr := struct{ fd uint32 }{uint32(f)}
	_, err := syscallBPF(unix.BPF_LINK_DETACH, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if errors.Is(err, unix.ENOLINK) {
		return nil
	}
	return err
}

// linkInfo is struct bpf_link_info for cgroup and netns links.
type linkInfo struct {
	kind   uint32 // enum bpf_link_type
	id     uint32
	progID uint32
	_      uint32
	target uint64 // cgroup: id, attach type; netns: inode, attach type
	attach uint32
	_      [22]uint32
}

// cgroupTarget and netnsTarget read the union: a cgroup id is 64 bits wide, a
// netns inode 32.
func (i *linkInfo) cgroupTarget() (id uint64, attach attachType) {
	return i.target, attachType(i.attach)
}

func (i *linkInfo) netnsTarget() (inode uint32, attach attachType) {
	return uint32(i.target), attachType(i.target >> 32)
}

// progInfo is the head of struct bpf_prog_info.
type progInfo struct {
	_    uint32 // type
	id   uint32
	_    [8]byte   // tag
	_    [2]uint32 // lengths of the code
	_    [2]uint64 // the code
	_    uint64    // load_time
	_    uint32    // created_by_uid
	_    uint32    // nr_map_ids
	_    uint64    // map_ids
	name [unix.BPF_OBJ_NAME_LEN]byte
}

// programByID opens a program by the kernel's number for it.
func programByID(id uint32) (fd, error) {
	attr := struct{ id, next, flags uint32 }{id: id}
	f, err := syscallBPF(unix.BPF_PROG_GET_FD_BY_ID, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return fd(f), err
}

func info[T any](f fd) (*T, error) {
	out := new(T)
	attr := struct {
		fd, len uint32
		info    unsafe.Pointer
	}{uint32(f), uint32(unsafe.Sizeof(*out)), unsafe.Pointer(out)}
	_, err := syscallBPF(unix.BPF_OBJ_GET_INFO_BY_FD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return nil, fmt.Errorf("get object info: %w", err)
	}
	return out, nil
}
