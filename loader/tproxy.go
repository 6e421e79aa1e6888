// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/tproxy"
)

// TProxy is what TPROXY mode changes in a network namespace (see package
// internal/tproxy), and what was there before.
type TProxy struct {
	IPv6    bool
	Sysctls map[string]string // below /proc/sys/net, as they were
}

// encode appends it as JSON; see Record.encode.
func (t *TProxy) encode(b []byte) []byte {
	b = append(b, `{"IPv6":`...)
	b = strconv.AppendBool(b, t.IPv6)
	b = append(b, `,"Sysctls":{`...)
	for i, key := range slices.Sorted(maps.Keys(t.Sysctls)) {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(appendJSONString(b, key), ':')
		b = appendJSONString(b, t.Sysctls[key])
	}
	return append(b, "}}"...)
}

func (n *Netns) tproxy(t *TProxy) tproxy.Netns {
	return tproxy.Netns{FD: int(n.fd), Do: n.do, IPv6: t.IPv6}
}

// planTProxy has the record say what TPROXY mode is going to change in the
// namespace, or an earlier policy of the same attachment has changed. What was
// there before the first of all attachments counts.
func (d *Datapath) planTProxy(r, old *Record, n *Netns) (err error) {
	if old != nil && old.TProxy != nil {
		t := *old.TProxy
		r.TProxy = &t
		if !r.isTProxy() {
			return nil
		}
		t.Sysctls, err = n.tproxy(&t).Before(t.Sysctls)
		return err
	}
	if !r.isTProxy() {
		return nil
	}
	shared, _, err := d.others(r)
	if err != nil {
		return err
	}
	if shared {
		records, err := Records(d.opts)
		if err != nil {
			return err
		}
		for _, other := range records {
			if other.ID != r.ID && other.Cookie == r.Cookie && other.Epoch == r.Epoch && other.TProxy != nil {
				r.TProxy = other.TProxy
				return nil
			}
		}
	}
	t := new(TProxy)
	err = n.do(func() (err error) {
		t.IPv6, err = tproxy.HasIPv6()
		return err
	})
	if err != nil {
		return err
	}
	t.Sysctls, err = n.tproxy(t).Sysctls()
	r.TProxy = t
	return err
}

func (r *Record) isTProxy() bool { return r.Rules.Flags&bpf.ShuntPodFlagPOD_TPROXY != 0 }

// dropTProxy undoes what an earlier policy of the attachment has changed and this
// one doesn't need.
func (d *Datapath) dropTProxy(r *Record, n *Netns) error {
	if r.TProxy == nil || r.isTProxy() {
		return nil
	}
	shared, _, err := d.others(r)
	if err != nil {
		return err
	}
	if !shared {
		if err := n.tproxy(r.TProxy).Undo(r.TProxy.Sysctls); err != nil {
			return err
		}
	}
	r.TProxy = nil
	return d.writeRecord(r)
}

// netns opens the record's network namespace; nil where its path does not lead to it:
// nothing is there or mounted there, or another namespace. That may be the host's, if
// the path is a process's whose number another has by now.
func (r *Record) netns() (*Netns, error) {
	n, err := OpenNetns(r.Netns)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errNotNamespace), errors.Is(err, ErrHostNetns):
		return nil, nil
	case err != nil:
		return nil, err
	case n.Cookie != r.Cookie:
		n.Close()
		return nil, nil
	}
	return n, nil
}

func (r *Record) undoTProxy() error {
	if r.TProxy == nil {
		return nil
	}
	n, err := r.netns()
	if err != nil || n == nil {
		return err
	}
	defer n.Close()
	return n.tproxy(r.TProxy).Undo(r.TProxy.Sysctls)
}

func (r *Record) checkTProxy() error {
	if r.TProxy == nil || !r.isTProxy() {
		return nil
	}
	n, err := r.netns()
	if err != nil {
		return err
	}
	if n == nil {
		return fmt.Errorf("network namespace %s is gone", r.Netns)
	}
	defer n.Close()
	missing, err := n.tproxy(r.TProxy).Check(r.TProxy.Sysctls)
	if err == nil && len(missing) > 0 {
		err = errors.New(strings.Join(missing, "; "))
	}
	return err
}
