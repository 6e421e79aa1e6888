// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
)

// An Interface is one of a network namespace's.
type Interface struct {
	Index uint32
	Name  string
	Up    bool
}

// Interfaces lists those other than lo.
func (n *Netns) Interfaces() (out []Interface, err error) {
	for range 5 {
		out = nil
		err = n.rt.request(unix.RTM_GETLINK, unix.NLM_F_DUMP, make([]byte, unix.SizeofIfInfomsg), func(m *syscall.NetlinkMessage) error {
			if len(m.Data) < unix.SizeofIfInfomsg {
				return unix.EBADMSG
			}
			info := (*unix.IfInfomsg)(unsafe.Pointer(unsafe.SliceData(m.Data)))
			if info.Flags&unix.IFF_LOOPBACK != 0 {
				return nil
			}
			i := Interface{Index: uint32(info.Index), Up: info.Flags&unix.IFF_UP != 0}
			attrs, err := syscall.ParseNetlinkRouteAttr(m)
			if err != nil {
				return err
			}
			for _, a := range attrs {
				if a.Attr.Type == unix.IFLA_IFNAME {
					i.Name = unix.ByteSliceToString(a.Value)
				}
			}
			out = append(out, i)
			return nil
		})
		if !errors.Is(err, errDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	return out, nil
}

// look has the programs know where the kernel keeps the pod's interfaces and
// addresses, compare those with the rules', and makes sure that they find there
// what an exclusion goes by.
func (d *Datapath) look(n *Netns) error {
	prog, err := d.object(bpf.ShuntProgShuntLook)
	if err != nil {
		return err
	}
	var errno uint32
	if err := n.do(func() (err error) { errno, err = testRun(prog); return err }); err != nil {
		return fmt.Errorf("run %s: %w", bpf.ShuntProgShuntLook, err)
	}
	switch errno := unix.Errno(errno); errno {
	case 0:
		return nil
	case unix.E2BIG:
		return fmt.Errorf("%w: the pod has more interfaces or addresses than the programs look at (16): %w", ErrInterfaces, errno)
	case unix.ENOSYS:
		return fmt.Errorf("%w: this kernel keeps its list of interfaces in another form: %w", ErrInterfaces, errno)
	case unix.ENOTUNIQ, unix.ENODEV:
		return fmt.Errorf("%w: the kernel's list of the pod's interfaces is not what it was a moment ago: %w", ErrInterfaces, errno)
	default:
		return fmt.Errorf("run %s: %w", bpf.ShuntProgShuntLook, errno)
	}
}
