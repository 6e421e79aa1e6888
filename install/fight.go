// SPDX-License-Identifier: Apache-2.0

package install

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// ErrFight says that somebody keeps undoing what is done.
var ErrFight = errors.New("the CNI configuration is changed back again and again")

// A fight remembers how often, and how soon, the entry had to be put back.
type fight struct {
	times times

	healed  []time.Time // of the last hour
	quick   int         // in a row that were undone at once
	pending bool        // it is undone
	due     time.Time   // when it may be put back
}

// undone says at which time the entry may be put back. Somebody who does not
// undo it at once is answered at once.
func (f *fight) undone(now time.Time) time.Time {
	if f.pending {
		return f.due
	}
	f.pending = true
	if n := len(f.healed); n > 0 && now.Sub(f.healed[n-1]) < f.times.quick {
		f.quick++
	} else {
		f.quick = 0
	}
	f.due = now
	if f.quick > 1 {
		f.due = now.Add(backOff(f.quick-2, f.times.retry, f.times.retryMax))
	}
	return f.due
}

// wrote notes that the entry was put, or put back.
func (f *fight) wrote(now time.Time) {
	f.pending = false
	f.healed = append(slices.DeleteFunc(f.healed, func(t time.Time) bool { return now.Sub(t) > time.Hour }), now)
}

// calm notes that the entry is there.
func (f *fight) calm(now time.Time) {
	f.pending = false
	n := len(f.healed)
	if n > 0 && now.Sub(f.healed[n-1]) > f.times.calm {
		if f.quick > 2 {
			f.healed = nil
		}
		f.quick = 0
	}
	f.healed = slices.DeleteFunc(f.healed, func(t time.Time) bool { return now.Sub(t) > time.Hour })
}

// on says whether it is one: undone three times in a row, or seven times within
// the hour.
func (f *fight) on() bool { return f.quick > 2 || len(f.healed) > 7 }

// backOff is the nth pause, from 0 on.
func backOff(n int, first, most time.Duration) time.Duration {
	if n > 20 {
		return most
	}
	return min(first<<n, most)
}

// blame says against whom, as far as files can tell, and what ends it.
func blame(file string, foreign, marks []string) error {
	has := func(word string) bool {
		return slices.Contains(foreign, word) || strings.Contains(file, strings.TrimSuffix(word, "-cni"))
	}
	var who string
	switch {
	case len(marks) > 0:
		who = fmt.Sprintf("Cilium takes the directory for its own (it has renamed %s): set cni.exclusive=false in its Helm values (cni-exclusive: \"false\" in its ConfigMap cilium-config)", strings.Join(marks, ", "))
	case has("cilium-cni"):
		who = "Cilium, whose file it is, puts it back: set cni.exclusive=false in its Helm values (cni-exclusive: \"false\" in its ConfigMap cilium-config)"
	case has("istio-cni"):
		who = "Istio's CNI agent has an entry in it too: uninstall one of the two"
	case has("multus"), has("multus-shim"):
		who = "Multus makes it of another file: give that one as cniConfFileName, or set --multus-conf-file to a file of your own"
	case has("calico"):
		who = "Calico's install-cni writes it: see why calico-node restarts, or which cni-config the Tigera operator is given"
	default:
		who = "look which agent of this node writes it (" + strings.Join(foreign, ", ") + "), and set it to leave the file alone"
	}
	return fmt.Errorf("%w: %s: %s", ErrFight, file, who)
}
