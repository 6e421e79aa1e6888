// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package bench measures what Shunt claims, as ratios within one run.
package bench

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/ebpf"
	"shunt.dev/shunt/redirect/iptables"
)

func TestMain(m *testing.M) {
	if os.Getenv(asAgent) != "" {
		if err := runAgent(); err != nil {
			fmt.Fprintln(os.Stderr, "agent:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testbed.Main(m)
}

// samples are durations of one thing.
type samples []time.Duration

func (s samples) median() time.Duration { return s.quantile(0.5) }

func (s samples) quantile(q float64) time.Duration {
	s = slices.Clone(s)
	slices.Sort(s)
	return s[int(q*float64(len(s)))]
}

// policy evaluates the bed's pod as the plugin does.
func policy(tb testing.TB, p *testbed.Pod) *redirect.Policy {
	tb.Helper()
	pod, err := redirect.ParsePod(p.Injected())
	if err != nil {
		tb.Fatal(err)
	}
	cfg := redirect.DefaultConfig()
	outcome, pol, err := cfg.Evaluate(pod)
	if err != nil || pol == nil {
		tb.Fatalf("evaluate: %+v, %v", outcome, err)
	}
	return pol
}

// restore runs an iptables-restore program in the pod's namespace.
func restore(p *testbed.Pod, program, input string) (took time.Duration, err error) {
	err = p.Do(func() error {
		cmd := exec.Command(program, "--noflush")
		cmd.Stdin = strings.NewReader(input)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		start := time.Now()
		err := cmd.Run()
		took = time.Since(start)
		if err != nil {
			return fmt.Errorf("%s: %w: %s", program, err, out.String())
		}
		return nil
	})
	return took, err
}

// tmpfs mounts one, which is what /run is everywhere.
func tmpfs(b *testing.B) string {
	dir := b.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16m,mode=0700"); err != nil {
		b.Fatalf("mount a tmpfs: %v", err)
	}
	b.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			b.Errorf("unmount the tmpfs: %v", err)
		}
	})
	return dir
}

// BenchmarkKernelProgramming compares, pod by pod and turn by turn, all that
// has to be done to a dual-stack pod once its facts are known: by eBPF, and by
// one iptables-restore plus one ip6tables-restore of the equal rule set. Every
// turn has fresh network namespaces and cgroups.
func BenchmarkKernelProgramming(b *testing.B) {
	testbed.Privileged(b)
	w := testbed.NewWorld(b)
	opts := loader.Options{BPFDir: testbed.BPFFS(b) + "/shunt", RunDir: tmpfs(b)}
	backend := ebpf.New(opts)
	steps := map[string]samples{}
	add := func(step string, d time.Duration) { steps[step] = append(steps[step], d) }
	timed := func(step string, f func() error) {
		start := time.Now()
		err := f()
		add(step, time.Since(start))
		if err != nil {
			b.Fatalf("%s: %v", step, err)
		}
	}
	turn := func() {
		p := testbed.NewPod(b, testbed.InWorld(w))
		pol := policy(b, p)
		target := redirect.Target{
			Attachment: redirect.Attachment{ContainerID: p.ContainerID, IfName: "eth0"},
			Netns:      p.NetnsPath(), Cgroup: p.CgroupPath(),
			Pod: redirect.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID},
		}
		timed("ebpf", func() error { return backend.Apply(b.Context(), target, pol) })
		timed("ebpf-remove", func() error { return backend.Remove(b.Context(), target.Attachment) })
		target.Hook = redirect.HookTC
		timed("tc", func() error { return backend.Apply(b.Context(), target, pol) })
		timed("tc-remove", func() error { return backend.Remove(b.Context(), target.Attachment) })

		// The same once more, step by step.
		var ns *loader.Netns
		var rs loader.Rules
		var d *loader.Datapath
		timed("step-netns", func() (err error) { ns, err = loader.OpenNetns(target.Netns); return err })
		timed("step-compile", func() error { rs = ebpf.Compile(pol, ebpf.Net{Netns: ns}); return nil })
		timed("step-open", func() (err error) { d, err = loader.Open(b.Context(), opts); return err })
		timed("step-attach", func() error {
			return d.Attach(loader.Target{
				ID:    loader.ID{ContainerID: p.ContainerID, IfName: "eth0"},
				Netns: ns, Cgroup: target.Cgroup, Pod: loader.PodRef(target.Pod),
			}, rs)
		})
		d.Close()
		ns.Close()
		if err := backend.Remove(b.Context(), target.Attachment); err != nil {
			b.Fatal(err)
		}

		for _, x := range []struct {
			program string
			family  iptables.Family
		}{{"iptables-restore", iptables.IPv4}, {"ip6tables-restore", iptables.IPv6}} {
			took, err := restore(p, x.program, iptables.Render(pol, x.family))
			if err != nil {
				b.Fatal(err)
			}
			add(x.program, took)
		}
		p.Destroy(b)
	}
	// As on a node in use, one pod of each inbound hook is there already: the
	// kernel patches its code when a hook gets its first program, and again
	// when it loses its last.
	for _, hook := range []redirect.Hook{redirect.HookSkLookup, redirect.HookTC} {
		first := testbed.NewPod(b, testbed.InWorld(w))
		err := backend.Apply(b.Context(), redirect.Target{
			Hook:       hook,
			Attachment: redirect.Attachment{ContainerID: first.ContainerID, IfName: "eth0"},
			Netns:      first.NetnsPath(), Cgroup: first.CgroupPath(),
		}, policy(b, first))
		if err != nil {
			b.Fatal(err)
		}
	}
	turn() // warm caches
	clear(steps)
	for b.Loop() {
		turn()
	}
	iptables := steps["iptables-restore"].median() + steps["ip6tables-restore"].median()
	b.ReportMetric(float64(iptables)/float64(steps["ebpf"].median()), "iptables/ebpf")
	b.ReportMetric(0, "ns/op")
	for name, s := range steps {
		b.ReportMetric(float64(s.median().Microseconds()), name+"-µs")
	}
}
