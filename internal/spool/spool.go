// SPDX-License-Identifier: Apache-2.0

// Package spool carries the plugin's log lines to the node agent: by a file,
// so that the plugin waits for nobody and nothing is lost while the agent is
// down. Writers append whole lines under a shared lock; the agent hands the
// lines on, and empties the file under an exclusive one.
//
// A log is no reason for a pod not to start, or to start late: whatever the
// file is (a FIFO, a symbolic link, on a full disk, locked), a write returns
// at once or after lockWait, and its line is lost then.
package spool

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxSize bounds the file, in bytes, for a node whose agent never comes
	// back. What comes then is lost: the first lines of a trouble tell most.
	maxSize = 4 << 20
	// lockWait is how long a writer waits for the lock, once; drainWait how
	// long the agent does.
	lockWait  = 20 * time.Millisecond
	drainWait = time.Second
)

// Path returns where the lines are.
func Path(runDir string) string { return filepath.Join(runDir, "log") }

// A Writer appends lines. It is for one goroutine at a time.
type Writer struct {
	path string
	fd   int // -1: not opened yet
	over bool
}

// Open returns a writer. The file is opened at the first line: most runs of
// the plugin have none.
func Open(runDir string) *Writer { return &Writer{path: Path(runDir), fd: -1} }

// Write appends p: one line, or several, whole. It always reports success, for
// nobody could do anything about it.
func (w *Writer) Write(p []byte) (int, error) {
	if !w.over {
		// Once something was in the way, later lines don't wait for it again.
		w.over = w.write(p) != nil
	}
	return len(p), nil
}

var errFull = errors.New("the file is full")

func (w *Writer) write(p []byte) error {
	if w.fd < 0 {
		fd, _, err := open(w.path, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT)
		if err != nil {
			return err
		}
		w.fd = fd
	}
	if err := lock(w.fd, unix.LOCK_SH, lockWait); err != nil {
		return err
	}
	defer func() { _ = unix.Flock(w.fd, unix.LOCK_UN) }() // of an open file it can't fail
	var st unix.Stat_t
	if err := unix.Fstat(w.fd, &st); err != nil {
		return err
	}
	if st.Size+int64(len(p)) > maxSize {
		return errFull
	}
	// One call: lines of others don't come in between. What a full disk cuts
	// short is no line, and is drained as what it is.
	_, err := unix.Write(w.fd, p)
	return err
}

// Close closes the file, if it was opened.
func (w *Writer) Close() error {
	w.over = true
	if w.fd < 0 {
		return nil
	}
	fd := w.fd
	w.fd = -1
	return unix.Close(fd)
}

// open opens a regular file and never waits: of a FIFO it would for a reader.
func open(path string, flags int) (fd int, size int64, err error) {
	for {
		fd, err = unix.Open(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return -1, 0, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return -1, 0, fmt.Errorf("%s is not a regular file: remove it", path)
	}
	return fd, st.Size, nil
}

// lock takes a flock within a bounded time.
func lock(fd, how int, wait time.Duration) error {
	deadline := time.Now().Add(wait)
	for {
		err := unix.Flock(fd, how|unix.LOCK_NB)
		if err == nil || err != unix.EWOULDBLOCK && err != unix.EINTR {
			return err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return err
		}
		<-time.After(min(left, time.Millisecond))
	}
}

// Drain hands the lines, without their newlines, to each, and empties the
// file. A line whose draining was interrupted, by death or by the error that
// is returned, is handed on again by the next Drain; none is lost. n counts
// the lines. each must not keep what it is given.
func Drain(runDir string, each func(line []byte)) (n int, err error) {
	path := Path(runDir)
	fd, size, err := open(path, unix.O_RDWR)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("drain the plugin's log: %w", err)
	}
	defer unix.Close(fd)
	if size == 0 {
		return 0, nil
	}
	hand := func(data []byte) {
		for line := range bytes.SplitSeq(data, []byte("\n")) {
			if len(line) > 0 {
				each(line)
				n++
			}
		}
	}
	fail := func(err error) (int, error) { return n, fmt.Errorf("drain the plugin's log %s: %w", path, err) }

	// What is whole already is handed on without the lock, for which writers
	// don't wait long. Only this function ever takes anything out of the file.
	data, err := readFrom(fd, 0)
	if err != nil {
		return fail(err)
	}
	whole := data[:bytes.LastIndexByte(data, '\n')+1]
	hand(whole)
	if err := lock(fd, unix.LOCK_EX, drainWait); err != nil {
		return fail(fmt.Errorf("lock it: %w", err))
	}
	// Another agent, as there are two in an upgrade, may have emptied it meanwhile.
	from := int64(len(whole))
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fail(fmt.Errorf("stat it: %w", err))
	} else if st.Size < from {
		from = 0
	}
	rest, err := readFrom(fd, from)
	if err != nil {
		return fail(err)
	}
	hand(rest)
	if err := unix.Ftruncate(fd, 0); err != nil {
		return fail(fmt.Errorf("empty it: %w", err))
	}
	return n, nil
}

// readFrom reads all that is behind an offset.
func readFrom(fd int, offset int64) ([]byte, error) {
	var data []byte
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Pread(fd, buf, offset)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return nil, fmt.Errorf("read it: %w", err)
		case n == 0:
			return data, nil
		default:
			data, offset = append(data, buf[:n]...), offset+int64(n)
		}
		if len(data) > 2*maxSize {
			return nil, fmt.Errorf("it is larger than %d bytes: remove it", 2*maxSize)
		}
	}
}

// Results of a Setup.
const (
	ResultOK     = "ok"
	ResultFailed = "failed"
)

// A Setup is what came of one ADD that programmed its pod, or failed to. Pods
// that are left alone have none.
type Setup struct {
	Backend  string  `json:"backend"`  // ebpf or iptables; empty when it failed before one was chosen
	Result   string  `json:"result"`   // ResultOK or ResultFailed
	Reason   string  `json:"reason"`   // a redirect.ReasonName; empty without a backend
	Fallback bool    `json:"fallback"` // iptables, and nobody has asked for it
	Seconds  float64 `json:"seconds"`
}

// SetupKey is the key, of the line's object, that has the Setup.
const SetupKey = "setup"

// ParseSetup reads the Setup out of a line, and reports whether it has one.
func ParseSetup(line []byte) (Setup, bool) {
	if !bytes.Contains(line, []byte(`"`+SetupKey+`":{`)) {
		return Setup{}, false
	}
	var l struct {
		Setup *Setup `json:"setup"`
	}
	if json.Unmarshal(line, &l) != nil || l.Setup == nil || l.Setup.Result != ResultOK && l.Setup.Result != ResultFailed {
		return Setup{}, false
	}
	return *l.Setup, true
}
