// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/redirect"
)

const (
	agentFile  = "agent"        // which DaemonSet the agent is, for the plugin
	socketFile = "agent.sock"   // where the agent answers the plugin
	tokenFile  = "token"        // the kubeconfig's, which the agent keeps fresh
	lockFile   = "install.lock" // held by who installs or uninstalls
	claimFile  = "claim"        // whose the node is; see claim
)

// TokenPath says where the agent keeps the token for the plugin's kubeconfig.
// Uninstall removes it.
func TokenPath(runDir string) string { return filepath.Join(runDir, tokenFile) }

func writeAgent(dir string, a redirect.AgentRef) (changed bool, err error) {
	return put(filepath.Join(dir, agentFile), []byte(a.Namespace+"/"+a.DaemonSet+"\n"), 0o600)
}

// lock keeps other installers of the node out: two agents, as an upgrade may
// have them for a while, and who uninstalls by hand. The kernel releases it
// when the process ends.
func lock(ctx context.Context, runDir string) (release func(), err error) {
	path := filepath.Join(runDir, lockFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, explain(err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("wait for %s, held by another shunt process: %w", path, context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}
