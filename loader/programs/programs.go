// SPDX-License-Identifier: Apache-2.0

// Package programs loads the programs into the kernel, for package loader.
package programs

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/bpf/object"
	"shunt.dev/shunt/loader/internal/load"
)

type programs struct{}

// New gives what loads the programs, for loader.Options.
func New() load.Programs { return programs{} }

// Load is load.Programs'.
func (programs) Load(r load.Request) error {
	maps := map[string]*ebpf.Map{}
	defer func() {
		for _, m := range maps {
			m.Close()
		}
	}()
	for name, path := range r.Maps {
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return fmt.Errorf("take over the map %s: %w", path, err)
		}
		maps[name] = m
	}
	objs, err := loadObjects(r, maps)
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return fmt.Errorf("%w: %w", load.ErrIncompatible, err)
	}
	if err != nil {
		return err
	}
	defer objs.Close()
	for name, o := range pinned(objs) {
		if err := o.Pin(filepath.Join(r.Dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// Try loads what Load loads, and lets it go.
func Try() error {
	objs, err := loadObjects(load.Request{}, nil)
	if err != nil {
		return err
	}
	return objs.Close()
}

type pinner interface{ Pin(string) error }

// objects are a loaded collection, with the map of its variables.
type objects struct {
	object.ShuntObjects
	Tracing *ebpf.Map `ebpf:".data.trace"`
}

func (o *objects) Close() error {
	return errors.Join(o.ShuntObjects.Close(), o.Tracing.Close())
}

func pinned(o *objects) map[string]pinner {
	return map[string]pinner{
		load.TracingPin:                o.Tracing,
		bpf.ShuntMapRings:              o.Rings,
		bpf.ShuntMapPods:               o.Pods,
		bpf.ShuntMapDests:              o.Dests,
		bpf.ShuntMapPorts:              o.Ports,
		bpf.ShuntMapStates:             o.States,
		bpf.ShuntMapErrors:             o.Errors,
		bpf.ShuntMapSockets:            o.Sockets,
		bpf.ShuntMapResolvers:          o.Resolvers,
		bpf.ShuntMapInflight:           o.Inflight,
		bpf.ShuntMapListeners:          o.Listeners,
		bpf.ShuntMapStamps:             o.Stamps,
		bpf.ShuntMapSlots:              o.Slots,
		bpf.ShuntProgShuntConnect4:     o.ShuntConnect4,
		bpf.ShuntProgShuntConnect6:     o.ShuntConnect6,
		bpf.ShuntProgShuntGetpeername4: o.ShuntGetpeername4,
		bpf.ShuntProgShuntGetpeername6: o.ShuntGetpeername6,
		bpf.ShuntProgShuntSendmsg4:     o.ShuntSendmsg4,
		bpf.ShuntProgShuntSendmsg6:     o.ShuntSendmsg6,
		bpf.ShuntProgShuntRecvmsg4:     o.ShuntRecvmsg4,
		bpf.ShuntProgShuntRecvmsg6:     o.ShuntRecvmsg6,
		bpf.ShuntProgShuntGetsockopt:   o.ShuntGetsockopt,
		bpf.ShuntProgShuntSockops:      o.ShuntSockops,
		bpf.ShuntProgShuntSkLookup:     o.ShuntSkLookup,
		bpf.ShuntProgShuntAdopt:        o.ShuntAdopt,
		bpf.ShuntProgShuntLook:         o.ShuntLook,
	}
}

// loadObjects loads the collection, with maps that are there already in the place
// of its own. The stamp program in it serves no pod: loading it shows at once
// whether a pod's own would be accepted.
func loadObjects(r load.Request, maps map[string]*ebpf.Map) (*objects, error) {
	// bpf_set_retval is there since Linux 5.18 (commit b44123b4a3dc),
	// bpf_skc_to_mptcp_sock since 5.19 (3bc253c2e652), if it has MPTCP. What
	// they do can be done without: try with them first.
	var first error
	for _, have := range []struct{ mptcp, setRetval bool }{{true, true}, {false, true}, {false, false}} {
		spec, err := object.LoadShunt()
		if err != nil {
			return nil, err
		}
		err = errors.Join(
			spec.Variables[bpf.ShuntVarHaveMptcp].Set(have.mptcp),
			spec.Variables[bpf.ShuntVarHaveSetRetval].Set(have.setRetval),
		)
		if err != nil {
			return nil, err
		}
		if r.InflightLimit != 0 {
			if err := spec.Variables[bpf.ShuntVarInflightLimit].Set(r.InflightLimit); err != nil {
				return nil, err
			}
		}
		sizeMaps(spec, r.MaxPrefixes)
		withoutTC(spec)
		objs := new(objects)
		if err = spec.LoadAndAssign(objs, &ebpf.CollectionOptions{MapReplacements: maps}); err == nil {
			return objs, nil
		}
		if errors.Is(err, unix.EPERM) {
			return nil, Classify(err)
		}
		if first == nil {
			first = err
		}
		// Only a refusal by the verifier can be due to a missing helper.
		var refused *ebpf.VerifierError
		if !errors.As(err, &refused) && !errors.Is(err, ebpf.ErrNotSupported) {
			break
		}
	}
	return nil, Classify(first)
}

func sizeMaps(spec *ebpf.CollectionSpec, maxPrefixes uint32) {
	if maxPrefixes != 0 {
		spec.Maps[bpf.ShuntMapDests].MaxEntries = maxPrefixes
		spec.Maps[bpf.ShuntMapPorts].MaxEntries = maxPrefixes
	}
}

// withoutTC replaces the TC program of a collection by one that does nothing: the
// true one is loaded when the first pod asks for it, and neither its cost nor its
// refusal by a kernel is for the others.
func withoutTC(spec *ebpf.CollectionSpec) {
	spec.Programs[bpf.ShuntProgShuntTc] = &ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: bpf.License,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	}
}

// LoadTC is load.Programs'. The pin is made in one step.
func (programs) LoadTC(r load.Request) error {
	spec, err := object.LoadShunt()
	if err != nil {
		return err
	}
	sizeMaps(spec, r.MaxPrefixes)
	maps := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		pin := name
		if name == load.TracingMap {
			pin = load.TracingPin
		} else if strings.HasPrefix(name, ".") {
			continue // constants
		}
		m, err := ebpf.LoadPinnedMap(filepath.Join(r.Dir, pin), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue // only this program has it
		}
		if err != nil {
			return err
		}
		defer m.Close()
		maps[name] = m
	}
	var objs struct {
		TC *ebpf.Program `ebpf:"shunt_tc"`
	}
	if err := spec.LoadAndAssign(&objs, &ebpf.CollectionOptions{MapReplacements: maps}); err != nil {
		return Classify(err)
	}
	defer objs.TC.Close()
	return objs.TC.Pin(filepath.Join(r.Dir, bpf.ShuntProgShuntTc))
}

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

// Classify says what it means that the kernel did not load the datapath.
func Classify(err error) error {
	// EACCES is the verifier's, who says why, or a security module's, who doesn't.
	var verifier *ebpf.VerifierError
	byModule := errors.Is(err, unix.EACCES) && !(errors.As(err, &verifier) && len(verifier.Log) > 0)
	switch {
	case errors.Is(err, unix.EPERM), byModule, !mayLoad():
		return fmt.Errorf("%w: %w (CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or CAP_SYS_ADMIN, are needed)", load.ErrPermission, err)
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EACCES),
		errors.Is(err, unix.E2BIG), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: %w", load.ErrRefused, err)
	}
	return err
}
