// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From include/uapi/linux/io_uring.h.
const (
	ioUringOpConnect = 16
	ioUringOffSQRing = 0
	ioUringOffCQRing = 0x8000000
	ioUringOffSQEs   = 0x10000000
)

type ioUringSQOffsets struct {
	head, tail, ringMask, ringEntries, flags, dropped, array, resv1 uint32
	userAddr                                                        uint64
}

type ioUringCQOffsets struct {
	head, tail, ringMask, ringEntries, overflow, cqes, flags, resv1 uint32
	userAddr                                                        uint64
}

type ioUringParams struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFD uint32
	resv                                                                   [3]uint32
	sqOff                                                                  ioUringSQOffsets
	cqOff                                                                  ioUringCQOffsets
}

type ioUringSQE struct {
	opcode, flags uint8
	ioprio        uint16
	fd            int32
	off, addr     uint64
	len, opFlags  uint32
	userData      uint64
	_             [3]uint64
}

type ioUringCQE struct {
	userData uint64
	res      int32
	flags    uint32
}

// ioUringConnect connects by a ring of one entry that lives for this call.
func ioUringConnect(fd int, dst netip.AddrPort, family int, timeout time.Duration) error {
	var params ioUringParams
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return errno
	}
	defer unix.Close(int(ring))
	mmap := func(off int64, size uint32) ([]byte, error) {
		return unix.Mmap(int(ring), off, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	}
	sq, err := mmap(ioUringOffSQRing, params.sqOff.array+params.sqEntries*4)
	if err != nil {
		return err
	}
	defer unix.Munmap(sq)
	cq, err := mmap(ioUringOffCQRing, params.cqOff.cqes+params.cqEntries*uint32(unsafe.Sizeof(ioUringCQE{})))
	if err != nil {
		return err
	}
	defer unix.Munmap(cq)
	sqes, err := mmap(ioUringOffSQEs, params.sqEntries*uint32(unsafe.Sizeof(ioUringSQE{})))
	if err != nil {
		return err
	}
	defer unix.Munmap(sqes)

	sa := rawSockaddr(dst, family)
	var pin runtime.Pinner
	pin.Pin(&sa[0])
	defer pin.Unpin()
	*(*ioUringSQE)(unsafe.Pointer(&sqes[0])) = ioUringSQE{
		opcode: ioUringOpConnect, fd: int32(fd),
		addr: uint64(uintptr(unsafe.Pointer(&sa[0]))), off: uint64(len(sa)),
	}
	*(*uint32)(unsafe.Pointer(&sq[params.sqOff.array])) = 0
	atomic.AddUint32((*uint32)(unsafe.Pointer(&sq[params.sqOff.tail])), 1)
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, 1, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	// The ring's descriptor is readable when the completion is there.
	if err := pollFD(int(ring), unix.POLLIN, time.Now().Add(timeout)); err != nil {
		return err
	}
	head := atomic.LoadUint32((*uint32)(unsafe.Pointer(&cq[params.cqOff.head])))
	if head == atomic.LoadUint32((*uint32)(unsafe.Pointer(&cq[params.cqOff.tail]))) {
		return fmt.Errorf("io_uring is readable without a completion")
	}
	cqe := (*ioUringCQE)(unsafe.Pointer(&cq[params.cqOff.cqes]))
	if cqe.res < 0 {
		return unix.Errno(-cqe.res)
	}
	return nil
}

// rawSockaddr gives the bytes of a sockaddr_in or sockaddr_in6.
func rawSockaddr(ap netip.AddrPort, family int) []byte {
	a := ap.Addr()
	if family == 4 {
		b := make([]byte, unix.SizeofSockaddrInet4)
		binary.NativeEndian.PutUint16(b, unix.AF_INET)
		binary.BigEndian.PutUint16(b[2:], ap.Port())
		ip := a.Unmap().As4()
		copy(b[4:], ip[:])
		return b
	}
	b := make([]byte, unix.SizeofSockaddrInet6)
	binary.NativeEndian.PutUint16(b, unix.AF_INET6)
	binary.BigEndian.PutUint16(b[2:], ap.Port())
	ip := a.As16()
	copy(b[8:], ip[:])
	return b
}
