// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// describe gives the configuration lines that say where and when the benchmarks
// run.
func describe(ctx context.Context, o options) (string, error) {
	var b strings.Builder
	line := func(key, value string) {
		if value = strings.TrimSpace(value); value != "" {
			fmt.Fprintf(&b, "%s: %s\n", key, value)
		}
	}
	line("goos", runtime.GOOS)
	line("goarch", runtime.GOARCH)
	line("pkg", "shunt.dev/shunt/bench")
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	line("cpu", field(cpuinfo, "model name"))
	line("cpus", strconv.Itoa(runtime.NumCPU()))
	if strings.Contains(field(cpuinfo, "flags"), " hypervisor") {
		line("machine", "virtual")
	}
	meminfo, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return "", err
	}
	if kib, err := strconv.ParseFloat(strings.TrimSuffix(field(meminfo, "MemTotal"), " kB"), 64); err == nil {
		line("memory", fmt.Sprintf("%.1f GiB", kib/(1<<20)))
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	line("kernel", unix.ByteSliceToString(u.Release[:]))
	if release, err := os.ReadFile("/etc/os-release"); err == nil {
		line("distribution", strings.Trim(field(bytes.ReplaceAll(release, []byte("="), []byte(":")), "PRETTY_NAME"), `"`))
	}
	line("iptables", output(ctx, "iptables", "--version"))
	line("go", runtime.Version())
	line("commit", output(ctx, "git", "describe", "--always", "--dirty", "--abbrev=12"))
	line("date", time.Now().UTC().Format(time.RFC3339))
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	first, _, _ := strings.Cut(string(load), " ")
	line("load", first)
	line("benchtime", o.benchtime)
	return b.String(), nil
}

// field finds the value of the first line "key : value".
func field(text []byte, key string) string {
	for l := range bytes.Lines(text) {
		k, v, ok := bytes.Cut(l, []byte(":"))
		if ok && string(bytes.TrimSpace(k)) == key {
			return string(bytes.TrimSpace(v))
		}
	}
	return ""
}

// output is what a program says, "" where there is none.
func output(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return ""
	}
	return string(out)
}

// A cpuTime is what /proc/stat says of all processors, in ticks of 10 ms.
type cpuTime struct{ all, idle, steal float64 }

func readCPU() (cpuTime, error) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return cpuTime{}, err
	}
	return parseCPU(stat)
}

// parseCPU reads the first line: user, nice, system, idle, iowait, irq, softirq
// and steal; guests are in user and nice.
func parseCPU(stat []byte) (t cpuTime, err error) {
	first, _, _ := strings.Cut(string(stat), "\n")
	f := strings.Fields(first)
	if len(f) < 9 || f[0] != "cpu" {
		return t, fmt.Errorf("/proc/stat: first line %q, want cpu and eight numbers", first)
	}
	for i, digits := range f[1:9] {
		v, err := strconv.ParseFloat(digits, 64)
		if err != nil {
			return t, fmt.Errorf("/proc/stat: first line %q: %q, want a number", first, digits)
		}
		t.all += v
		switch i {
		case 3, 4:
			t.idle += v
		case 7:
			t.steal = v
		}
	}
	return t, nil
}

const ticksPerSecond = 100 // USER_HZ, of every architecture that Shunt is built for

// shares are, in percent of all CPU time between two readings, what the host
// stole and what others than the benchmark took, the kernel's threads included.
func shares(before, after cpuTime, own time.Duration) (steal, others float64) {
	all := after.all - before.all
	if all <= 0 {
		return 0, 0
	}
	busy := all - (after.idle - before.idle) - (after.steal - before.steal)
	steal = (after.steal - before.steal) / all * 100
	others = max(busy-own.Seconds()*ticksPerSecond, 0) / all * 100
	return steal, others
}
