// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/redirect"
)

// podArgs is what CNI_ARGS says of the pod. All of it may be empty.
type podArgs struct {
	Namespace, Name, UID string
}

func (p podArgs) String() string {
	if p.Namespace == "" && p.Name == "" {
		return ""
	}
	return p.Namespace + "/" + p.Name
}

// parseArgs reads CNI_ARGS: KEY=VALUE pairs between semicolons, in any order,
// among them keys of others. What is no pair is passed over, as runtimes
// expect of plugins that are given IgnoreUnknown.
func parseArgs(args string) podArgs {
	var p podArgs
	for pair := range strings.SplitSeq(args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			p.Namespace = value
		case "K8S_POD_NAME":
			p.Name = value
		case "K8S_POD_UID":
			p.UID = value
		}
	}
	return p
}

// readAgent reads which DaemonSet the node agent is (P4) from runDir/agent,
// where the agent writes namespace/daemonset. Without that file, as after a
// reboot, or with one that can't be read, it is who the network configuration
// names.
func readAgent(runDir string, configured redirect.AgentRef, log *slog.Logger) redirect.AgentRef {
	path := filepath.Join(runDir, "agent")
	data, err := readSmall(path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			log.Warn("the node agent's name can't be read", "error", err)
		}
		return configured
	}
	agent, ok := redirect.ParseAgentRef(string(data))
	if !ok {
		log.Warn("the node agent's name can't be read: expected namespace/daemonset", "file", path)
		return configured
	}
	return agent
}

// readSmall reads at most 1 KiB of a regular file.
func readSmall(path string) ([]byte, error) {
	// O_NONBLOCK: nothing that somebody put there may hold up an ADD.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	return io.ReadAll(io.LimitReader(f, 1<<10))
}

// Levels above slog's own, at which nothing is logged by this plugin: an error
// that ends it is printed by the protocol.
const levelFatal = slog.LevelError + 4

// newLog returns a logger of structured lines at a level of the contract: on
// standard error, and to the agent.
func newLog(w, spool io.Writer, level string) *slog.Logger {
	l := slog.LevelWarn
	switch level {
	case "panic", "fatal":
		l = levelFatal
	case "error":
		l = slog.LevelError
	case "info":
		l = slog.LevelInfo
	case "debug":
		l = slog.LevelDebug
	}
	opts := &slog.HandlerOptions{Level: l}
	return slog.New(slog.NewMultiHandler(slog.NewTextHandler(w, opts), slog.NewJSONHandler(spool, opts)))
}

// checkNetns fails unless path is a network namespace, and another than the
// host's. The plugin runs in the host's; where it doesn't, process 1 tells.
func checkNetns(path string) error {
	pod, err := netnsOf(path)
	if err != nil {
		return err
	}
	for _, host := range []string{"/proc/self/ns/net", "/proc/1/ns/net"} {
		ns, err := netnsOf(host)
		if err != nil {
			// Of process 1 it may be hidden from us. Ours is not.
			if host == "/proc/self/ns/net" {
				return err
			}
			continue
		}
		if ns == pod {
			return fmt.Errorf("netns %s is the host's own (that of %s), which is never programmed", path, host)
		}
	}
	return nil
}

// A nsID tells namespaces apart (see namespaces(7)).
type nsID struct{ dev, ino uint64 }

// netnsOf returns which network namespace path is.
func netnsOf(path string) (nsID, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nsID{}, &fs.PathError{Op: "open netns", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var fsType unix.Statfs_t
	if err := unix.Fstatfs(fd, &fsType); err != nil {
		return nsID{}, &fs.PathError{Op: "statfs netns", Path: path, Err: err}
	}
	kind := 0
	if fsType.Type == unix.NSFS_MAGIC {
		if kind, err = unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err != nil {
			return nsID{}, &fs.PathError{Op: "get the type of namespace", Path: path, Err: err}
		}
	}
	if kind != unix.CLONE_NEWNET {
		return nsID{}, fmt.Errorf("%s is not a network namespace", path)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nsID{}, &fs.PathError{Op: "stat netns", Path: path, Err: err}
	}
	return nsID{dev: st.Dev, ino: st.Ino}, nil
}
