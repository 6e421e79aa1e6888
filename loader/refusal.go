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

	"shunt.dev/shunt/bpf"
)

// A refusal is the kernel's conclusive no to this build's datapath, kept in
// RunDir until the next boot: a node on which every pod goes by iptables must
// not load and verify everything for each of them, one after the other.
type refusal struct {
	Build string // the digest of the programs
	Boot  string
	Error string
}

// refusedError is an ErrRefused that was found by an earlier process.
type refusedError struct{ said, path string }

func (e *refusedError) Error() string {
	return fmt.Sprintf("%s (found earlier since the machine has booted; remove %s to have it tried again)", e.said, e.path)
}
func (e *refusedError) Unwrap() error { return ErrRefused }

func (d *Datapath) refusalPath() string { return filepath.Join(d.opts.RunDir, "refused") }

// refusedBefore fails where the kernel is known to refuse the datapath. What
// can't be read is not known.
func (d *Datapath) refusedBefore() error {
	data, err := os.ReadFile(d.refusalPath())
	if err != nil {
		return nil //nolint:nilerr // not known
	}
	var r refusal
	if json.Unmarshal(data, &r) != nil || r.Build != bpf.Digest || r.Boot == "" || r.Boot != BootID() || r.Error == "" {
		return nil
	}
	return &refusedError{r.Error, d.refusalPath()}
}

// noteRefusal keeps a conclusive no. To fail at that costs time only.
func (d *Datapath) noteRefusal(refused error) {
	if !errors.Is(refused, ErrRefused) {
		return
	}
	data, err := json.Marshal(refusal{bpf.Digest, BootID(), refused.Error()})
	if err == nil {
		next := d.refusalPath() + ".new" // under the node's lock
		if err = os.WriteFile(next, data, 0o600); err == nil {
			err = os.Rename(next, d.refusalPath())
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.opts.Log.Warn("the kernel's refusal could not be kept; the next pod finds it anew", "error", err)
	}
}

// BootID names this boot of the machine; empty when it can't be told.
func BootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Release is the running kernel's, as uname has it.
func Release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}
