// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// FuzzRecord: a record is read, or is an error; what is written of it is JSON, and
// reads as the same.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"ContainerID":"c","IfName":"eth0","Network":"n","Build":"datapath-1","Epoch":"e","Cookie":1,"Rules":{"UID":1337,"Dests":[{"Prefix":"10.0.0.0/8","Flags":1,"Source":""}],"Ports":[{"Direction":1,"Port":80,"Bits":16,"Flags":2}]}}`))
	f.Add([]byte(`{"Interfaces":[{"Index":2,"Name":"eth0","Filter":true}],"Leaving":[{"Index":3}],"TProxy":{},"Pod":{"Namespace":"\u0000<","Name":"\"","UID":"é"}}`))
	f.Add([]byte(`{"Rules":{"Source4":"10.0.0.1","Source6":"fe80::1%eth0","Interface":"net1"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := new(Record)
		if json.Unmarshal(data, r) != nil {
			return
		}
		again := new(Record)
		first := r.encode()
		if err := json.Unmarshal(first, again); err != nil {
			t.Fatalf("%s: %v", first, err)
		}
		if second := again.encode(); !slices.Equal(first, second) {
			t.Errorf("%s is written again as %s", first, second)
		}
	})
}

// FuzzMountinfo: a mount table gives places of cgroup2, or an error.
func FuzzMountinfo(f *testing.F) {
	f.Add("30 20 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n31 20 0:27 /a /x\\040y rw - cgroup2 none rw\n")
	f.Add(" - cgroup2\n1 2 3 4 5 - cgroup2 x\n")
	f.Fuzz(func(t *testing.T, table string) {
		mounts, err := cgroup2Mounts(strings.NewReader(table))
		if err == nil && len(mounts) > 0 && !strings.Contains(table, "cgroup2") {
			t.Errorf("%q of %q", mounts, table)
		}
	})
}

// FuzzCgroupPath: neither a runtime's hint nor a pod's UID leads out of the tree.
func FuzzCgroupPath(f *testing.F) {
	f.Add("/kubepods/burstable/podx", "0a1b2c3d-0000-4000-8000-000000000001")
	f.Add("kubepods-burstable-pod1.slice:cri-containerd:abc", "..")
	f.Add("../../etc", "x/../../y")
	f.Fuzz(func(t *testing.T, hint, uid string) {
		paths := hintPaths(hint)
		if isPodUID(uid) {
			paths = append(paths, uidPaths(uid)...)
		}
		for _, p := range paths {
			if !filepath.IsLocal(p) {
				t.Errorf("hint %q and UID %q lead to %q", hint, uid, p)
			}
		}
	})
}
