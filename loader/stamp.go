// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
)

// Each pod's netns has a copy of the stamp program of its own. To load one costs
// the better part of what a pod costs, so a few are loaded with the datapath,
// those of pods that are gone are used again, and only when none is left a new
// one is loaded. A copy that no pod has lies in the datapath's folder for them,
// under its slot's number; one in use lies in the folder of its pod's netns
// links. It moves by a rename: there is no moment in which it is in both, or in
// none.
const (
	stampsDir     = "free" // below the datapath's folder
	stampPrefix   = "program-"
	stampsAtStart = 16 // copies that are loaded with the datapath
)

// takeStamp gives the pod with the folder dir a stamp program that stamps with
// its cookie. fresh says that the folder was made just now.
func (d *Datapath) takeStamp(dir string, fresh bool, cookie uint64) (_ fd, err error) {
	var slot uint32
	if !fresh {
		if slot, err = d.ownStamp(dir); err != nil {
			return -1, err
		}
	}
	if slot == 0 {
		if slot, err = d.moveStamp(dir); err != nil {
			return -1, err
		}
	}
	var prog fd
	if slot != 0 {
		prog, err = getPin(stampPath(dir, slot))
	} else {
		slot, prog, err = d.newStamp(func(slot uint32) string { return stampPath(dir, slot) })
	}
	if err != nil {
		return -1, err
	}
	slots, err := d.object(bpf.ShuntMapSlots)
	if err == nil {
		err = update(slots, &slot, &cookie, updateAny)
	}
	if err != nil {
		prog.close()
		return -1, fmt.Errorf("write the stamp's slot: %w", err)
	}
	return prog, nil
}

func stampPath(dir string, slot uint32) string {
	return dir + "/" + stampPrefix + strconv.FormatUint(uint64(slot), 10)
}

// ownStamp finds the slot of the program that a pod has already; 0 for none.
func (d *Datapath) ownStamp(dir string) (slot uint32, err error) {
	err = eachName(dir, func(name string) error {
		if number, ok := strings.CutPrefix(name, stampPrefix); ok {
			n, err := strconv.ParseUint(number, 10, 32)
			slot = uint32(n)
			return err
		}
		return nil
	})
	return slot, err
}

// moveStamp moves a free program into dir; 0 if there is none.
func (d *Datapath) moveStamp(dir string) (slot uint32, err error) {
	pool := d.dir + "/" + stampsDir
	name, err := anyName(pool)
	if err != nil {
		return 0, fmt.Errorf("look for a free stamp program: %w", err)
	}
	if name == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(name, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("look for a free stamp program: %w", err)
	}
	if err := unix.Rename(pool+"/"+name, stampPath(dir, uint32(n))); err != nil {
		return 0, fmt.Errorf("take stamp program %s of %s: %w", name, pool, err)
	}
	return uint32(n), nil
}

// anyName gives one name in a folder; empty where there is none.
func anyName(dir string) (string, error) {
	f, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(f)
	buf := make([]byte, 256) // ., .. and one more at least
	for {
		n, err := unix.ReadDirent(f, buf)
		if err != nil {
			return "", &fs.PathError{Op: "list", Path: dir, Err: err}
		}
		if n <= 0 {
			return "", nil
		}
		if _, _, names := unix.ParseDirent(buf[:n], 1, nil); len(names) > 0 {
			return names[0], nil
		}
	}
}

// newStamp loads a program for a slot that no other has, and pins it.
func (d *Datapath) newStamp(path func(slot uint32) string) (slot uint32, prog fd, err error) {
	if slot, err = d.newSlot(); err != nil {
		return 0, -1, err
	}
	if prog, err = d.loadStamp(slot); err != nil {
		return 0, -1, err
	}
	if err := prog.pin(path(slot)); err != nil {
		prog.close()
		return 0, -1, err
	}
	return slot, prog, nil
}

// newSlot gives a slot that no program has: the next after the highest, or one that
// was lost, where the map ends.
func (d *Datapath) newSlot() (slot uint32, err error) {
	slots, err := d.object(bpf.ShuntMapSlots)
	if err != nil {
		return 0, err
	}
	var highest uint32
	var last, cookie uint64
	if err := lookup(slots, &highest, &last); err != nil {
		return 0, fmt.Errorf("read the highest slot: %w", err)
	}
	slot = uint32(last) + 1
	err = lookup(slots, &slot, &cookie)
	if errors.Is(err, unix.ENOENT) {
		if slot, err = d.lostSlot(slots, uint32(last)); err != nil {
			return 0, fmt.Errorf("find a slot for a stamp program: %w", err)
		}
		return slot, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read slot %d of the stamp programs: %w", slot, err)
	}
	// The highest slot is noted first: a process that ends here loses one.
	last++
	if err := update(slots, &highest, &last, updateAny); err != nil {
		return 0, fmt.Errorf("write the highest slot: %w", err)
	}
	return slot, nil
}

// lostSlot finds a slot that was given out and that no program has: of processes
// that ended before they had made one, and of builds that are gone.
func (d *Datapath) lostSlot(slots fd, highest uint32) (uint32, error) {
	taken := map[string]bool{}
	for _, x := range []struct{ pattern, prefix string }{
		{filepath.Join(netnsLinks, "*", stampPrefix+"*"), stampPrefix},
		{filepath.Join(datapathPrefix+"*", stampsDir, "*"), ""},
		{filepath.Join(loadPrefix+"*", stampsDir, "*"), ""},
	} {
		paths, err := filepath.Glob(filepath.Join(d.opts.BPFDir, x.pattern))
		if err != nil {
			return 0, err
		}
		for _, path := range paths {
			taken[strings.TrimPrefix(filepath.Base(path), x.prefix)] = true
		}
	}
	for slot := uint32(1); slot <= highest; slot++ {
		if taken[strconv.FormatUint(uint64(slot), 10)] {
			continue
		}
		var cookie uint64
		err := lookup(slots, &slot, &cookie)
		if errors.Is(err, unix.ENOENT) {
			break // the map's end
		}
		if err != nil {
			return 0, fmt.Errorf("read slot %d: %w", slot, err)
		}
		if cookie == 0 {
			return slot, nil
		}
	}
	return 0, ErrFull
}

// loadStamp loads a stamp program for a slot.
func (d *Datapath) loadStamp(slot uint32) (fd, error) {
	code, err := bpf.Stamp(slot, func(name string) (int, error) { f, err := d.object(name); return int(f), err })
	if err != nil {
		return -1, err
	}
	return loadProgram(unix.BPF_PROG_TYPE_SK_LOOKUP, attachSkLookup, bpf.ShuntProgShuntStamp, bpf.License, code)
}

// returnStamps gives back the programs that a pod has.
func (d *Datapath) returnStamps(dir string) error {
	return eachName(dir, func(name string) error {
		number, ok := strings.CutPrefix(name, stampPrefix)
		if !ok {
			return nil
		}
		n, err := strconv.ParseUint(number, 10, 32)
		if err != nil {
			return err
		}
		slot, none := uint32(n), uint64(0)
		slots, err := d.slots()
		if errors.Is(err, errForeignSlots) {
			return nil // the program goes with its pin
		}
		if err != nil {
			return err
		}
		if err := update(slots, &slot, &none, updateAny); err != nil {
			return fmt.Errorf("clear the stamp's slot: %w", err)
		}
		return os.Rename(filepath.Join(dir, name), filepath.Join(d.dir, stampsDir, number))
	})
}

// loseStamp clears the slot of a stamp program that is about to go with its pod's
// folder, if it is this datapath's: lostSlot finds it then.
func (d *Datapath) loseStamp(cookie uint64) error {
	slot, err := d.ownStamp(d.netnsLinks(cookie))
	if err != nil || slot == 0 {
		return err
	}
	slots, err := d.slots()
	if err != nil {
		return err
	}
	var has, none uint64
	err = lookup(slots, &slot, &has)
	if errors.Is(err, unix.ENOENT) || err == nil && has != cookie {
		return nil // another datapath's
	}
	if err == nil {
		err = update(slots, &slot, &none, updateAny)
	}
	if err != nil {
		return fmt.Errorf("clear the stamp's slot: %w", err)
	}
	return nil
}

// stampIn returns the id of the program that stamps with cookie in the pod's
// folder; 0 if there is none. It fails with errForeignSlots where that can't be told.
func (d *Datapath) stampIn(dir string, cookie uint64) (id uint32, err error) {
	slot, err := d.ownStamp(dir)
	if err != nil || slot == 0 {
		return 0, err
	}
	slots, err := d.slots()
	if err != nil {
		return 0, err
	}
	var has uint64
	if err := lookup(slots, &slot, &has); err != nil || has != cookie {
		return 0, err
	}
	prog, err := getPin(stampPath(dir, slot))
	if err != nil {
		return 0, err
	}
	defer prog.close()
	pi, err := info[progInfo](prog)
	if err != nil {
		return 0, err
	}
	return pi.id, nil
}

// errForeignSlots: what a stamp program stamps with can't be told.
var errForeignSlots = errors.New("the slots of the stamp programs are laid out otherwise")

// slots opens the map of the datapath's stamp programs, which may be another build's:
// a value that is larger than we know would be written beyond its place.
func (d *Datapath) slots() (fd, error) {
	slots, err := d.object(bpf.ShuntMapSlots)
	if err != nil {
		return -1, err
	}
	mi, err := info[mapInfo](slots)
	if err != nil {
		return -1, err
	}
	if mi.keySize != 4 || mi.valueSize != cookieSize {
		return -1, fmt.Errorf("%w: keys of %d bytes and values of %d, want 4 and %d", errForeignSlots, mi.keySize, mi.valueSize, cookieSize)
	}
	return slots, nil
}

// eachName calls fn with the names in a folder that may not be there, or is removed
// by another process now: that says ENOENT too, however far it has been read.
func eachName(dir string, fn func(name string) error) error {
	f, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(f)
	var names []string
	buf := make([]byte, 4<<10)
	for {
		n, err := unix.ReadDirent(f, buf)
		if errors.Is(err, unix.ENOENT) {
			break
		}
		if err != nil {
			return &fs.PathError{Op: "list", Path: dir, Err: err}
		}
		if n <= 0 {
			break
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
	for _, name := range names {
		if err := fn(name); err != nil {
			return err
		}
	}
	return nil
}
