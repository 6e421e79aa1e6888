// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// An ID names an attachment, as the CNI specification does.
type ID struct {
	ContainerID string
	IfName      string
}

func (id ID) String() string { return id.ContainerID + "@" + id.IfName }

// A Record is what is known of one attachment: written before anything is
// changed for it, removed after everything has been undone. With it an
// attachment can be undone by its ID alone, whatever was done.
type Record struct {
	ID
	// BootID is the boot that the cookie belongs to: after the next one, the
	// number may be another pod's, and nothing of this one is left.
	BootID string
	Build  string // the datapath's directory below BPFDir
	Pod    PodRef

	Cookie   uint64
	NetnsIno uint32
	Netns    string // path, for messages
	Cgroup   string // path, for messages and CHECK
	CgroupID uint64

	Rules Rules
}

// PodRef says whose pod it is.
type PodRef struct {
	Namespace, Name, UID string
}

// Names of the folders in RunDir. The folder of a cgroup or netns holds an
// empty file for each attachment that needs its links: whoever can remove the
// folder was the last.
const (
	recordsDir  = "attachments"
	cgroupUsers = "cgroups"
	netnsUsers  = "netns"
)

func (d *Datapath) recordPath(id ID) string {
	return filepath.Join(d.opts.RunDir, recordsDir, id.String()+".json")
}

// readRecord returns nil without error when there is none. A record that can't
// be parsed is an error: it is what DEL goes by.
func (d *Datapath) readRecord(id ID) (*Record, error) {
	return readRecordFile(d.recordPath(id))
}

func readRecordFile(path string) (*Record, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the attachment's record: %w", err)
	}
	r := new(Record)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("parse the attachment's record %s: %w", path, err)
	}
	return r, nil
}

func (d *Datapath) writeRecord(r *Record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := d.recordPath(r.ID)
	if err = replace(path, data); errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(path), 0o700); err == nil {
			err = replace(path, data)
		}
	}
	if err != nil {
		return fmt.Errorf("write the attachment's record: %w", err)
	}
	return nil
}

// replace puts data in the place of a file, whole or not at all whenever this
// process ends. Nothing is synced: a record means nothing after the next boot.
// The node's lock keeps others from the temporary name.
func replace(path string, data []byte) error {
	next := filepath.Join(filepath.Dir(path), ".next")
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return err
	}
	return os.Rename(next, path)
}

func (d *Datapath) removeRecord(id ID) error {
	if err := os.Remove(d.recordPath(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the attachment's record: %w", err)
	}
	return nil
}

// Records lists the attachments that have a record.
func Records(opts Options) ([]*Record, error) {
	entries, err := os.ReadDir(filepath.Join(opts.RunDir, recordsDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	var (
		records []*Record
		errs    []error
	)
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".json") {
			continue // a write under way
		}
		r, err := readRecordFile(filepath.Join(opts.RunDir, recordsDir, e.Name()))
		if err != nil {
			errs = append(errs, err)
		} else if r != nil {
			records = append(records, r)
		}
	}
	return records, errors.Join(errs...)
}

// claim notes that an attachment uses the links of kind's object.
func (d *Datapath) claim(kind, object string, id ID) error {
	dir := filepath.Join(d.opts.RunDir, kind, object)
	file := filepath.Join(dir, id.String())
	err := touch(file)
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(dir, 0o700); err == nil {
			err = touch(file)
		}
	}
	return err
}

func touch(path string) error {
	f, err := unix.Open(path, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return &fs.PathError{Op: "create", Path: path, Err: err}
	}
	return unix.Close(f)
}

// users lists who else uses the links of kind's object.
func (d *Datapath) others(kind, object string, id ID) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(d.opts.RunDir, kind, object))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.Name() != id.String() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// unclaim is the reverse of claim.
func (d *Datapath) unclaim(kind, object string, id ID) error {
	dir := filepath.Join(d.opts.RunDir, kind, object)
	if err := os.Remove(filepath.Join(dir, id.String())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := os.Remove(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

// bootID names the time since the last boot.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}
