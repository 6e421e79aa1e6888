// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"encoding/json"
	"strings"
	"testing"
)

// FuzzCgroup: what /proc/PID/cgroup says of a process never makes it one of a pod
// whose UID is not there, nor gives a container's id that is none.
func FuzzCgroup(f *testing.F) {
	const uid = "0a1b2c3d-0000-4000-8000-000000000001"
	id := strings.Repeat("ab", 32)
	f.Add("0::/kubepods/burstable/pod"+uid+"/"+id+"\n", uid)
	f.Add("12:cpu:/\n0::/kubepods.slice/kubepods-pod"+strings.ReplaceAll(uid, "-", "_")+".slice/cri-containerd-"+id+".scope\n", uid)
	f.Add("0::/../../pod/x", "")
	f.Fuzz(func(t *testing.T, cgroups, uid string) {
		if namesPod(cgroups, uid) && !strings.Contains(cgroups, uid) && !strings.Contains(cgroups, strings.ReplaceAll(uid, "-", "_")) {
			t.Errorf("%q is taken for pod %q's", cgroups, uid)
		}
		if c := containerOf(cgroups); c != "" && (!isContainerID(c) || !strings.Contains(cgroups, c)) {
			t.Errorf("container %q of %q", c, cgroups)
		}
	})
}

// FuzzInfo: what a container runtime says of a sandbox beyond the CRI.
func FuzzInfo(f *testing.F) {
	f.Add(`{"pid":12,"runtimeSpec":{"linux":{"namespaces":[{"type":"network","path":"/run/netns/x"}]}}}`)
	f.Add(`{"sandboxMetadata":{"Metadata":{"NetNSPath":"/run/netns/y"}}}`)
	f.Add(`{"sandboxMetadata":{"NetNSPath":"/run/netns/y"},"pid":-1}`)
	f.Add(`{}`)
	f.Fuzz(func(t *testing.T, text string) {
		netns, pid, err := parseInfo(map[string]string{"info": text})
		if err == nil && (netns == "" && pid == 0 || !json.Valid([]byte(text))) {
			t.Errorf("%q gives %q and %d", text, netns, pid)
		}
	})
}
