// SPDX-License-Identifier: Apache-2.0

// Package record says where the iptables backend keeps what it knows of an
// attachment. It is apart from that for who only wants to know whether there is
// anything.
package record

import (
	"path/filepath"

	"shunt.dev/shunt/redirect"
)

// Dir returns the folder of the records, and of their lock.
func Dir(runDir string) string { return filepath.Join(runDir, "iptables") }

// Path returns where an attachment's record is, if it has one.
func Path(runDir string, a redirect.Attachment) string {
	return filepath.Join(Dir(runDir), a.ContainerID+"@"+a.IfName+".json")
}
