// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Environment that makes the test binary become an agent as in its container.
const (
	inContainer   = "SHUNT_NODE_TEST_CONTAINER"    // the program
	containerCaps = "SHUNT_NODE_TEST_CAPABILITIES" // numbers of those that it has
	containerRW   = "SHUNT_NODE_TEST_VOLUMES"      // directories that it may write to
)

func init() {
	if program := os.Getenv(inContainer); program != "" {
		fmt.Fprintln(os.Stderr, "become a container:", becomeContainer(program))
		os.Exit(120)
	}
}

// container has a command run as the chart has the agent's container run: as
// root with the given capabilities and no way to more, the first process of its
// namespace, a file system that it can only read but for the volumes, and
// without the host's processes and network namespaces in it.
func container(cmd *exec.Cmd, caps []int, volumes ...string) {
	cmd.Env = append(cmd.Env, inContainer+"="+cmd.Path, containerCaps+"="+strings.Trim(fmt.Sprint(caps), "[]"), containerRW+"="+strings.Join(volumes, ":"))
	cmd.Path = "/proc/self/exe"
	if exe, err := os.Executable(); err == nil {
		cmd.Path = exe
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
}

// becomeContainer runs on the process's first thread, as init functions do.
func becomeContainer(program string) error {
	// What is mounted on the host later is seen, as with HostToContainer.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep mounts to oneself: %w", err)
	}
	volumes := strings.Split(os.Getenv(containerRW), ":")
	for _, v := range volumes {
		if err := unix.Mount(v, v, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind %s: %w", v, err)
		}
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fmt.Errorf("make all read-only: %w", err)
	}
	for _, v := range volumes {
		if err := unix.MountSetattr(unix.AT_FDCWD, v, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fmt.Errorf("make %s writable: %w", v, err)
		}
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	keep := map[int]bool{}
	var data [2]unix.CapUserData
	for _, s := range strings.Fields(os.Getenv(containerCaps)) {
		n, err := strconv.Atoi(s)
		if err != nil {
			return err
		}
		keep[n] = true
		data[n/32].Permitted |= 1 << (n % 32)
		data[n/32].Effective |= 1 << (n % 32)
	}
	for n := 0; n <= unix.CAP_LAST_CAP; n++ {
		if keep[n] {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", n, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("want no new privileges: %w", err)
	}
	var env []string
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, inContainer+"=") {
			env = append(env, kv)
		}
	}
	return syscall.Exec(program, os.Args, env)
}
