// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/iptables"
)

// network is the name under which this command's own attachments are recorded.
// No CNI network can have it (libcni: letters, digits, _ . -), so no runtime's
// GC takes them for its own.
const network = "shunt apply"

// A namespace is a pod's network namespace as records know it.
type namespace struct {
	path   string // absolute
	inode  uint64
	cookie uint64 // 0: the kernel has none to give (before Linux 5.14)
}

// openNamespace looks at the network namespace at path, and refuses the host's.
func openNamespace(path string) (namespace, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return namespace{}, err
	}
	n := namespace{path: path}
	opened, err := loader.OpenNetns(path)
	switch {
	case errors.Is(err, loader.ErrHostNetns):
		return n, fmt.Errorf("%w: it is never programmed", err)
	case errors.Is(err, unix.ENOPROTOOPT): // which is said after the host's was ruled out
	case err != nil:
		return n, err
	default:
		n.cookie = opened.Cookie
		opened.Close()
	}
	n.inode, err = inode(path)
	return n, err
}

func inode(path string) (uint64, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}

// An attached is an attachment that something is recorded of, by either backend.
type attached struct {
	redirect.Attachment
	network  string
	pod      redirect.PodRef
	ebpf     *loader.Record
	iptables *iptables.Record
}

func (a *attached) String() string { return a.ContainerID + "@" + a.IfName }

// by names the datapaths.
func (a *attached) by() string {
	var list []string
	if a.ebpf != nil {
		list = append(list, string(redirect.EBPF))
	}
	if a.iptables != nil {
		list = append(list, string(redirect.Iptables))
	}
	return strings.Join(list, " and ")
}

// in says whether the attachment is one of a network namespace.
func (a *attached) in(n namespace) bool {
	return a.ebpf != nil && uint64(a.ebpf.NetnsIno) == n.inode && a.ebpf.Cookie == n.cookie ||
		a.iptables != nil && a.iptables.Of(n.inode, n.cookie)
}

// findAttached lists what the node's records know, sorted.
func findAttached(conf *netconf.Config) ([]*attached, error) {
	found := map[redirect.Attachment]*attached{}
	at := func(id redirect.Attachment, network string, pod redirect.PodRef) *attached {
		if found[id] == nil {
			found[id] = &attached{Attachment: id, network: network, pod: pod}
		}
		return found[id]
	}
	records, err := loader.Records(loader.Options{BPFDir: conf.BPFDir, RunDir: conf.RunDir})
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		at(redirect.Attachment(r.ID), r.Network, redirect.PodRef(r.Pod)).ebpf = r
	}
	rules, err := iptables.Records(conf.RunDir)
	if err != nil {
		return nil, err
	}
	for _, r := range rules {
		at(r.Attachment, r.Network, r.Pod).iptables = r
	}
	all := make([]*attached, 0, len(found))
	for _, a := range found {
		all = append(all, a)
	}
	slices.SortFunc(all, func(a, b *attached) int { return cmp.Compare(a.String(), b.String()) })
	return all, nil
}

// choose says which attachment of a namespace is to be worked on: the one that
// is there, for a second beside it could not be removed without the first. It
// returns a new one where there is none. id and ifname are the caller's wish, or
// empty.
func choose(all []*attached, n namespace, id, ifname string) (*attached, error) {
	var here []*attached
	for _, a := range all {
		if a.in(n) {
			here = append(here, a)
		} else if id != "" && a.ContainerID == id && (ifname == "" || a.IfName == ifname) {
			return nil, fmt.Errorf("attachment %v is of another network namespace than %s: `shunt remove --container-id %s` ends it", a, n.path, id)
		}
	}
	if len(here) == 0 {
		if id == "" {
			id = fmt.Sprintf("netns-%d", cmp.Or(n.cookie, n.inode))
		}
		return &attached{Attachment: redirect.Attachment{ContainerID: id, IfName: cmp.Or(ifname, "eth0")}, network: network}, nil
	}
	wished := slices.DeleteFunc(slices.Clone(here), func(a *attached) bool {
		return id != "" && a.ContainerID != id || ifname != "" && a.IfName != ifname
	})
	if len(wished) == 0 {
		return nil, fmt.Errorf("network namespace %s has the attachment %s already: leave --container-id and --ifname away to work on that one, or remove it",
			n.path, joined(here, (*attached).String))
	}
	// A pod of several CNI attachments has its first as eth0.
	if i := slices.IndexFunc(wished, func(a *attached) bool { return a.IfName == "eth0" }); i > 0 {
		return wished[i], nil
	}
	return wished[0], nil
}

// of fails where an attachment is known to be another pod's.
func (a *attached) of(pod redirect.PodRef) error {
	if a.pod.Name == "" || a.pod.Name == pod.Name && a.pod.Namespace == pod.Namespace {
		return nil
	}
	return usagef("attachment %v is of pod %s/%s, --pod of %s/%s", a, a.pod.Namespace, a.pod.Name, pod.Namespace, pod.Name)
}
