// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"golang.org/x/sys/unix"
)

// lockTimeout bounds the wait for other shunt processes on the node. A pod
// takes less than a millisecond.
const lockTimeout = 20 * time.Second

// lock takes the node's lock, in runDir: whoever holds it is alone in changing
// pins, records and links. The kernel releases it when the process ends, however
// it ends. It waits until ctx is done, lockTimeout at most.
func lock(ctx context.Context, runDir string) (func(), error) {
	return flock(ctx, runDir+"/lock", unix.O_CREAT|unix.O_RDWR, unix.LOCK_EX)
}

// lockToRead takes the node's lock together with others who only read. It makes
// no lock: where there is none the error is fs.ErrNotExist.
func lockToRead(ctx context.Context, runDir string) (func(), error) {
	return flock(ctx, runDir+"/lock", unix.O_RDONLY, unix.LOCK_SH)
}

func flock(ctx context.Context, path string, mode, how int) (func(), error) {
	f, err := unix.Open(path, mode|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the node's lock: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	release := func() { _ = unix.Close(f) }
	err = unix.Flock(f, how|unix.LOCK_NB)
	if err == nil {
		return release, nil
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		release()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	// The kernel queues those who wait; polling would not be fair.
	done := make(chan error, 1)
	go func() {
		for {
			err := unix.Flock(f, how)
			if !errors.Is(err, unix.EINTR) {
				done <- err
				return
			}
		}
	}()
	select {
	case err = <-done:
		if err != nil {
			release()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		return release, nil
	case <-ctx.Done():
		go func() {
			<-done //nolint:errcheck // nobody waits for the lock any more
			release()
		}()
		return nil, fmt.Errorf("wait for %s, held by another shunt process: %w", path, context.Cause(ctx))
	}
}
