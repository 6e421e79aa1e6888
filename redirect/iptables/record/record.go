// SPDX-License-Identifier: Apache-2.0

// Package record says where the iptables backend keeps what it knows of an
// attachment. It is apart from that for who only wants to know whether there is
// anything.
package record

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"shunt.dev/shunt/redirect"
)

// Dir returns the folder of the records, and of their lock.
func Dir(runDir string) string { return filepath.Join(runDir, "iptables") }

// Path returns where an attachment's record is, if it has one.
func Path(runDir string, a redirect.Attachment) string {
	return filepath.Join(Dir(runDir), a.ContainerID+"@"+a.IfName+".json")
}

// NextPath returns where a record is written before it takes its name. A process
// that is killed in between leaves it to the next one that has the container's lock.
func NextPath(runDir string, a redirect.Attachment) string { return Path(runDir, a) + ".next" }

// Any reports whether there may be anything of an attachment: a record, or what a
// process has left that was to write one.
func Any(runDir string, a redirect.Attachment) bool {
	for _, path := range []string{Path(runDir, a), NextPath(runDir, a)} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	return false
}
