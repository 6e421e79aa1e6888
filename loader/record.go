// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
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
	// Network is the CNI network's name.
	Network string
	// Build is the datapath's directory below BPFDir, and Epoch the name of
	// that one load. After a reboot there is another, and the cookie may be
	// another pod's: nothing of this attachment is left then.
	Build string
	Epoch string
	Pod   PodRef

	Cookie   uint64
	NetnsIno uint32
	Netns    string // path, for messages
	Cgroup   string // path, for messages and CHECK
	CgroupID uint64

	InboundHook InboundHook
	// Interfaces have the TC program; Leaving are those that may have it still.
	Interfaces []TCInterface
	Leaving    []TCInterface
	// TProxy is what TPROXY mode has changed in the network namespace; nil for
	// nothing.
	TProxy *TProxy `json:",omitempty"`

	Rules Rules
}

// PodRef says whose pod it is.
type PodRef struct {
	Namespace, Name, UID string
}

// Names of the folders in RunDir. In users, each record has a second name that
// says whose links it uses: the netns cookie, the cgroup's id, the attachment.
const (
	recordsDir = "attachments"
	usersDir   = "users"
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
	path, user := d.recordPath(r.ID), d.userPath(r)
	write := func() error {
		if err := replace(path, r.encode()); err != nil {
			return err
		}
		err := unix.Link(path, user)
		if err == nil || errors.Is(err, unix.EEXIST) {
			return nil // its content is an earlier record's: only the name counts
		}
		return &os.LinkError{Op: "link", Old: path, New: user, Err: err}
	}
	err := write()
	// Either folder may be missing: a process may have ended between the two.
	if errors.Is(err, fs.ErrNotExist) {
		if err = errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.MkdirAll(filepath.Dir(user), 0o700)); err == nil {
			err = write()
		}
	}
	if err != nil {
		return fmt.Errorf("write the attachment's record: %w", err)
	}
	return nil
}

// encode gives the record as JSON. It is written by hand because reflection
// costs more than all else here, in a process that does it once.
func (r *Record) encode() []byte {
	b := make([]byte, 0, 1024+64*len(r.Rules.Dests)+64*len(r.Rules.Ports))
	str := func(key, value string) {
		b = append(b, key...)
		b = appendJSONString(b, value)
	}
	num := func(key string, value uint64) {
		b = append(b, key...)
		b = strconv.AppendUint(b, value, 10)
	}
	str(`{"ContainerID":`, r.ContainerID)
	str(`,"IfName":`, r.IfName)
	str(`,"Network":`, r.Network)
	str(`,"Build":`, r.Build)
	str(`,"Epoch":`, r.Epoch)
	str(`,"Pod":{"Namespace":`, r.Pod.Namespace)
	str(`,"Name":`, r.Pod.Name)
	str(`,"UID":`, r.Pod.UID)
	num(`},"Cookie":`, r.Cookie)
	num(`,"NetnsIno":`, uint64(r.NetnsIno))
	str(`,"Netns":`, r.Netns)
	str(`,"Cgroup":`, r.Cgroup)
	num(`,"CgroupID":`, r.CgroupID)
	if r.InboundHook != "" {
		str(`,"InboundHook":`, string(r.InboundHook))
	}
	interfaces := func(key string, list []TCInterface) {
		for i, x := range list {
			num(key+`{"Index":`, uint64(x.Index))
			str(`,"Name":`, x.Name)
			b = append(strconv.AppendBool(append(b, `,"Filter":`...), x.Filter), '}')
			if key = ","; i == len(list)-1 {
				b = append(b, ']')
			}
		}
	}
	interfaces(`,"Interfaces":[`, r.Interfaces)
	interfaces(`,"Leaving":[`, r.Leaving)
	if r.TProxy != nil {
		b = r.TProxy.encode(append(b, `,"TProxy":`...))
	}
	num(`,"Rules":{"UID":`, uint64(r.Rules.UID))
	num(`,"GID":`, uint64(r.Rules.GID))
	num(`,"OutboundPort":`, uint64(r.Rules.OutboundPort))
	num(`,"InboundPort":`, uint64(r.Rules.InboundPort))
	num(`,"TunnelPort":`, uint64(r.Rules.TunnelPort))
	num(`,"DNSPort":`, uint64(r.Rules.DNSPort))
	num(`,"Flags":`, uint64(r.Rules.Flags))
	str(`,"Source4":`, addrText(r.Rules.Source4))
	str(`,"Source6":`, addrText(r.Rules.Source6))
	if r.Rules.Interface != "" {
		str(`,"Interface":`, r.Rules.Interface)
	}
	b = append(b, `,"Dests":[`...)
	for i, d := range r.Rules.Dests {
		if i > 0 {
			b = append(b, ',')
		}
		str(`{"Prefix":`, prefixText(d.Prefix))
		num(`,"Flags":`, uint64(d.Flags))
		str(`,"Source":`, addrText(d.Source))
		b = append(b, '}')
	}
	b = append(b, `],"Ports":[`...)
	for i, p := range r.Rules.Ports {
		if i > 0 {
			b = append(b, ',')
		}
		num(`{"Direction":`, uint64(p.Direction))
		num(`,"Port":`, uint64(p.Port))
		num(`,"Bits":`, uint64(p.Bits))
		num(`,"Flags":`, uint64(p.Flags))
		b = append(b, '}')
	}
	return append(b, "]}}\n"...)
}

func prefixText(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.String()
}

func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func appendJSONString(b []byte, s string) []byte {
	for i := range len(s) {
		if s[i] < ' ' || s[i] >= 0x7f || s[i] == '"' || s[i] == '\\' {
			quoted, _ := json.Marshal(s) // can't fail for a string
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

// replace puts data in the place of a file, whole or not at all whenever this
// process ends. Nothing is synced: a record means nothing after the next boot.
// The node's lock keeps others from the temporary name.
func replace(path string, data []byte) error {
	next := path[:strings.LastIndexByte(path, '/')+1] + ".next"
	f, err := unix.Open(next, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return &fs.PathError{Op: "open", Path: next, Err: err}
	}
	n, err := unix.Write(f, data)
	if err == nil && n != len(data) {
		err = unix.ENOSPC // the next call would have said it
	}
	if err := errors.Join(err, unix.Close(f)); err != nil {
		return errors.Join(&fs.PathError{Op: "write", Path: next, Err: err}, os.Remove(next))
	}
	if err := unix.Rename(next, path); err != nil {
		return &fs.PathError{Op: "rename to", Path: path, Err: err}
	}
	return nil
}

// removeRecord removes both names of a record. That by which DEL finds it is
// the last to go.
func (d *Datapath) removeRecord(r *Record) error {
	for _, path := range []string{d.userPath(r), d.recordPath(r.ID)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the attachment's record: %w", err)
		}
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

func (d *Datapath) userPath(r *Record) string {
	name := strconv.FormatUint(r.Cookie, 10) + "." + strconv.FormatUint(r.CgroupID, 10) + "." + r.ID.String()
	return filepath.Join(d.opts.RunDir, usersDir, name)
}

// others reports whether other attachments use the links of r's network
// namespace, and those of its cgroup.
func (d *Datapath) others(r *Record) (netns, cgroup bool, err error) {
	err = d.eachSharer(r, func(_ string, sameNetns, sameCgroup bool) error {
		netns, cgroup = netns || sameNetns, cgroup || sameCgroup
		return nil
	})
	return netns, cgroup, err
}

// sharers gives the records of the attachments that use a link which r's does.
func (d *Datapath) sharers(r *Record) (out []*Record, err error) {
	err = d.eachSharer(r, func(id string, _, _ bool) error {
		o, err := readRecordFile(filepath.Join(d.opts.RunDir, recordsDir, id+".json"))
		if err != nil || o == nil || o.Cookie != r.Cookie && o.CgroupID != r.CgroupID {
			return err // the name is an earlier record's
		}
		out = append(out, o)
		return nil
	})
	return out, err
}

// eachSharer calls fn with the other attachments that share r's network namespace or
// cgroup, by the second names of their records.
func (d *Datapath) eachSharer(r *Record, fn func(id string, netns, cgroup bool) error) error {
	dir, err := os.Open(filepath.Join(d.opts.RunDir, usersDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	own, cookie, group := r.ID.String(), strconv.FormatUint(r.Cookie, 10), strconv.FormatUint(r.CgroupID, 10)
	for _, name := range names {
		c, rest, _ := strings.Cut(name, ".")
		g, id, _ := strings.Cut(rest, ".")
		if id == own || c != cookie && g != group {
			continue
		}
		if err := fn(id, c == cookie, g == group); err != nil {
			return err
		}
	}
	return nil
}

// epochLink is a symbolic link in a datapath's directory that leads nowhere: its
// target is the datapath's epoch. It can be read by one call, and nothing that is
// done to the directory (chmod, chown, a new security label) changes it.
const epochLink = "epoch"

// newEpoch names one load of a datapath. The kernel is asked itself: package
// crypto/rand costs a process more, at its start, than it takes here.
func newEpoch() string {
	var b [16]byte
	if _, err := unix.Getrandom(b[:], 0); err != nil {
		panic(err) // of so little, there always is as much
	}
	return hex.EncodeToString(b[:])
}

// epoch names the datapath in a directory until it is removed or the node
// reboots; empty where there is none.
func (d *Datapath) epoch(build string) (string, error) {
	id, err := os.Readlink(filepath.Join(d.opts.BPFDir, build, epochLink))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read the datapath's epoch: %w", err)
	}
	return id, nil
}

// Epoch names the load of a build's datapath (see ThisBuild and Record) that is there;
// empty where there is none.
func Epoch(opts Options, build string) (string, error) {
	return (&Datapath{opts: opts}).epoch(build)
}
