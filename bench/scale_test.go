// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	cilium "github.com/cilium/ebpf"

	"shunt.dev/shunt/internal/testbed"
)

// BenchmarkScale measures what the pods that are redirected on a node cost one
// that comes after them: its kernel programming, with so many there, on the way up
// and on the way down, so that what is due to the machine shows; and what memory
// they take. again/1 is the 1st pod's, when all have gone, by the 1st's of the whole
// run. The first way only. The pods' namespaces and cgroups are there all the time:
// they are the node's, not ours.
//
//   - B/pod: what the datapath's maps and programs have grown by, as the kernel
//     reckons each (memlock in fdinfo): all that a pod takes besides its links.
//   - maps-B/pod: the maps alone. The rest is each pod's own small program, which
//     the kernel reckons as a page.
//   - kernel-B/pod: what the whole machine's kernel memory has grown by (Slab,
//     Percpu and VmallocUsed of /proc/meminfo), with the pods' links, pins and
//     records; others' doings are in it too.
//   - pins/pod: files in bpfDir.
func BenchmarkScale(b *testing.B) {
	testbed.Privileged(b)
	n := newNode(b)
	l := newLedger(b)
	sizes, taken := []int{1, 250, 500, 1000}, 25
	if testing.Short() {
		sizes, taken = []int{1, 1000}, 15
	}
	w := ways[0]
	most := sizes[len(sizes)-1]
	progress("scale: %d pods are made", most)
	crowd, newcomers := n.crowd(b, most), n.crowd(b, taken)
	apply := func(p *testbed.Pod) time.Duration {
		t, pol, backend := target(w, p), policy(b, p), n.backend(w)
		start := time.Now()
		err := backend.Apply(b.Context(), t, pol)
		took := time.Since(start)
		if err != nil {
			b.Fatal(err)
		}
		return took
	}
	name := func(pods int) string { return fmt.Sprintf("Scale/pods=%d", pods) }
	// measure has one more pod come and go. name's pods are with the newcomer.
	measure := func(pods int, again bool) {
		progress("scale: %d pods", pods)
		for _, p := range newcomers.fresh(b, taken) {
			took := apply(p)
			n.remove(b, w, p)
			l.add(name(pods), took)
			if again && l.warm {
				l.kept["again"] = append(l.kept["again"], took)
			}
		}
	}
	present := 0
	upTo := func(pods int) {
		for ; present < pods; present++ {
			apply(crowd.pods[present])
		}
	}
	measure(1, false)
	l.warm = true
	rounds := 0
	for turn := 0; b.Loop(); turn++ {
		if !every(200, turn) {
			continue
		}
		if rounds++; rounds > 1 {
			crowd.fresh(b, most)
		}
		for _, size := range sizes {
			before, had := n.memory(b), present
			upTo(size - 1)
			// newNode's pods are not counted, neither before nor after.
			if grown := present - had; size == most {
				n.memory(b).since(before).record(l, name(size), grown)
			}
			measure(size, false)
		}
		for _, size := range slices.Backward(sizes) {
			n.removeAll(b, w, crowd.pods[size-1:present])
			present = size - 1
			measure(size, size == 1)
		}
	}
	b.ReportMetric(0, "ns/op")
	l.ratio(fmt.Sprintf("%d/1", most), name(most), 0.5, name(1), 0.5)
	l.ratio("again/1", "again", 0.5, name(1), 0.5)
	for _, s := range sizes {
		l.micros(fmt.Sprintf("%d-pods", s), name(s))
	}
}

// memory is what a node's redirected pods take.
type memory struct {
	maps, programs, kernel uint64 // bytes
	pins                   int
}

func (m memory) since(before memory) memory {
	return memory{m.maps - before.maps, m.programs - before.programs, m.kernel - before.kernel, m.pins - before.pins}
}

// record records the memory by pod.
func (m memory) record(l *ledger, name string, pods int) {
	values := []value{
		{float64(m.maps+m.programs) / float64(pods), "B/pod"},
		{float64(m.maps) / float64(pods), "maps-B/pod"},
		{float64(int64(m.kernel)) / float64(pods), "kernel-B/pod"},
		{float64(m.pins) / float64(pods), "pins/pod"},
	}
	record(l, name, values...)
	for _, v := range values {
		l.ReportMetric(v.v, v.unit)
	}
}

var meminfo = regexp.MustCompile(`(?m)^(Slab|Percpu|VmallocUsed): +(\d+) kB$`)

func (n *node) memory(b *testing.B) memory {
	b.Helper()
	var m memory
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		b.Fatal(err)
	}
	for _, x := range meminfo.FindAllSubmatch(data, -1) {
		kib, err := strconv.ParseUint(string(x[2]), 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		m.kernel += kib << 10
	}
	err = filepath.WalkDir(n.bpfDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		m.pins++
		if d.Type()&fs.ModeSymlink != 0 { // the load's epoch
			return nil
		}
		return m.add(path)
	})
	if err != nil {
		b.Fatal(err)
	}
	return m
}

// add adds what a pinned map or program takes. What is neither is a link.
func (m *memory) add(path string) error {
	if pinned, err := cilium.LoadPinnedMap(path, nil); err == nil {
		defer pinned.Close()
		info, err := pinned.Info()
		if err != nil {
			return err
		}
		size, ok := info.Memlock()
		if !ok {
			return fmt.Errorf("%s: the kernel does not say what it takes", path)
		}
		m.maps += size
		return nil
	}
	pinned, err := cilium.LoadPinnedProgram(path, nil)
	if err != nil {
		return nil //nolint:nilerr // a link
	}
	defer pinned.Close()
	info, err := pinned.Info()
	if err != nil {
		return err
	}
	size, ok := info.Memlock()
	if !ok {
		return fmt.Errorf("%s: the kernel does not say what it takes", path)
	}
	m.programs += size
	return nil
}
