// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
)

// A series is one that grows with every pod's own: of metric, the labels' values.
type series struct {
	Metric string // metricFlows or metricErrors
	A, B   string
}

// The metrics that accounts make up.
const (
	metricFlows  = "flows"
	metricErrors = "errors"
)

func (s series) compare(o series) int {
	return strings.Compare(s.Metric+"\x00"+s.A+"\x00"+s.B, o.Metric+"\x00"+o.A+"\x00"+o.B)
}

// Accounts turn what the kernel counts for each pod, which goes with the pod,
// into counters of the node, which only grow. They outlive the agent in a file:
// a counter that begins anew below where it was would make a rate jump by all
// that the pods have counted so far.
//
// What a pod has counted since it was last looked at goes with it.
type accounts struct {
	path string
	// totals are the node's counters, seen what each pod's stood at.
	totals map[series]uint64
	seen   map[string]map[series]uint64
}

// accountsFile is the file's name in runDir.
const accountsFile = "counts"

// The file's form.
type (
	savedCount struct {
		series
		Count uint64
	}
	savedPod struct {
		Pod    string // its attachment
		Counts []savedCount
	}
	savedAccounts struct {
		Totals []savedCount
		Pods   []savedPod
	}
)

// openAccounts goes on where the agent before this one has ended. Where that
// can't be told, it begins anew, and says so.
func openAccounts(runDir string) (*accounts, error) {
	a := &accounts{path: filepath.Join(runDir, accountsFile), totals: map[series]uint64{}, seen: map[string]map[series]uint64{}}
	data, err := os.ReadFile(a.path)
	if errors.Is(err, fs.ErrNotExist) {
		return a, nil
	}
	var saved savedAccounts
	if err == nil {
		err = json.Unmarshal(data, &saved)
	}
	if err != nil {
		return a, fmt.Errorf("read the counters that the agent before this one has kept: %w", err)
	}
	for _, c := range saved.Totals {
		a.totals[c.series] = c.Count
	}
	for _, p := range saved.Pods {
		a.seen[p.Pod] = map[series]uint64{}
		for _, c := range p.Counts {
			a.seen[p.Pod][c.series] = c.Count
		}
	}
	return a, nil
}

// book adds what the pods have counted since the last call. whole says that
// pods has all of the node's; then those that are missing are forgotten.
func (a *accounts) book(pods map[string]map[series]uint64, whole bool) {
	for pod, counts := range pods {
		before := a.seen[pod]
		if before == nil {
			before = map[series]uint64{}
			a.seen[pod] = before
		}
		for s, now := range counts {
			grown := now
			// Less than before: it was programmed anew, or the kernel has
			// forgotten and counts from the beginning.
			if now >= before[s] {
				grown -= before[s]
			}
			a.totals[s] += grown
			before[s] = now
		}
	}
	if !whole {
		return
	}
	for pod := range a.seen {
		if _, ok := pods[pod]; !ok {
			delete(a.seen, pod)
		}
	}
}

// save keeps the accounts. It comes before the totals are shown to anybody, so
// that the next agent never shows less.
func (a *accounts) save() error {
	saved := savedAccounts{Totals: sorted(a.totals)}
	for pod, counts := range a.seen {
		saved.Pods = append(saved.Pods, savedPod{pod, sorted(counts)})
	}
	slices.SortFunc(saved.Pods, func(x, y savedPod) int { return strings.Compare(x.Pod, y.Pod) })
	data, err := json.Marshal(saved)
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(a.path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := renameio.WriteFile(a.path, data, 0o600); err != nil {
		return fmt.Errorf("keep the counters for the next agent: %w", err)
	}
	return nil
}

func sorted(m map[series]uint64) []savedCount {
	out := make([]savedCount, 0, len(m))
	for s, n := range m {
		out = append(out, savedCount{s, n})
	}
	slices.SortFunc(out, func(x, y savedCount) int { return x.compare(y.series) })
	return out
}
