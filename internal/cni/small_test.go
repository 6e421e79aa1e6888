// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"os"
	"testing"

	"shunt.dev/shunt/internal/handover"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/iptables/record"
)

// What iptables has left of an attachment the small executable does not pass over,
// nor what only a process has left that was killed before its record had a name.
func TestSmallLeavesIptables(t *testing.T) {
	a := redirect.Attachment{ContainerID: "c", IfName: "eth0"}
	for name, path := range map[string]func(string, redirect.Attachment) string{
		"nothing": nil, "a record": record.Path, "a record without a name": record.NextPath,
	} {
		p := podSide{runDir: t.TempDir()}
		if path != nil {
			if err := os.MkdirAll(record.Dir(p.runDir), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path(p.runDir, a), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		n := needed(p.byIptables(a))
		if (n != nil) != (path != nil) || n != nil && n.Reason != handover.Iptables {
			t.Errorf("%s: %v is needed", name, n)
		}
	}
}
