// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// quick is what a write may take on a busy machine, whatever is in its way.
const quick = lockWait + time.Second

func drain(t *testing.T, dir string) []string {
	t.Helper()
	var lines []string
	n, err := Drain(dir, func(line []byte) { lines = append(lines, string(line)) })
	if err != nil || n != len(lines) {
		t.Errorf("drain: %d, %v", n, err)
	}
	return lines
}

func write(t *testing.T, dir string, lines ...string) {
	t.Helper()
	w := Open(dir)
	defer w.Close()
	for _, line := range lines {
		if n, err := io.WriteString(w, line+"\n"); err != nil || n != len(line)+1 {
			t.Errorf("write: %d, %v", n, err)
		}
	}
}

// TestRoundTrip: what is written is drained once, in order; the file is
// private, and none is made for nothing.
func TestRoundTrip(t *testing.T) {
	dir := t.TempDir()
	if err := Open(dir).Close(); err != nil {
		t.Error(err)
	}
	if got := drain(t, dir); got != nil {
		t.Errorf("of nothing: %q", got)
	}
	if _, err := os.Stat(Path(dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file for nothing: %v", err)
	}
	for range 2 {
		write(t, dir, "a", "b")
		write(t, dir, "c")
		st, err := os.Stat(Path(dir))
		if err != nil || st.Mode() != 0o600 || st.Size() != 6 {
			t.Errorf("%v, %v", st, err)
		}
		if diff := cmp.Diff([]string{"a", "b", "c"}, drain(t, dir)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if got := drain(t, dir); got != nil {
			t.Errorf("again: %q", got)
		}
	}
}

// TestConcurrent: writers and drains at once lose nothing, repeat nothing and
// mix nothing.
func TestConcurrent(t *testing.T) {
	dir := t.TempDir()
	const writers, lines = 8, 200
	var wg sync.WaitGroup
	var writing atomic.Int32
	writing.Store(writers)
	lost := Open(dir) // opened before, and used all the while: the file stays the same
	for w := range writers {
		wg.Go(func() {
			defer writing.Add(-1)
			for i := range lines {
				s := Open(dir)
				// A busy machine may hold a lock for longer than a writer
				// waits: then its line is lost, and that is right. Not here.
				for s.write([]byte(fmt.Sprintf("%d/%d %s\n", w, i, strings.Repeat("x", i)))) != nil {
				}
				s.Close()
			}
		})
	}
	got := map[string]int{}
	for {
		last := writing.Load() == 0
		for _, line := range drain(t, dir) {
			got[line]++
		}
		if last {
			break
		}
	}
	wg.Wait()
	lost.Close()
	for w := range writers {
		for i := range lines {
			if n := got[fmt.Sprintf("%d/%d %s", w, i, strings.Repeat("x", i))]; n != 1 {
				t.Errorf("line %d of %d came %d times", i, w, n)
			}
		}
	}
	if len(got) != writers*lines {
		t.Errorf("%d different lines", len(got))
	}
}

// TestBounded: with nobody who drains it the file ends at its bound, with whole
// lines, and goes on once it is drained.
func TestBounded(t *testing.T) {
	dir := t.TempDir()
	line := strings.Repeat("x", 1<<20-1)
	write(t, dir, line, line, line, line, "too much")
	st, err := os.Stat(Path(dir))
	if err != nil || st.Size() != maxSize {
		t.Fatalf("%v, %v", st, err)
	}
	if got := drain(t, dir); len(got) != 4 {
		t.Errorf("%d lines", len(got))
	}
	write(t, dir, "after")
	if got := drain(t, dir); len(got) != 1 || got[0] != "after" {
		t.Errorf("%q", got)
	}
}

// TestInTheWay: a writer returns at once whatever the file is, and never makes
// or changes anything else.
func TestInTheWay(t *testing.T) {
	for name, put := range map[string]func(t *testing.T, dir, path string){
		"no directory": func(t *testing.T, dir, _ string) {
			if err := os.Remove(dir); err != nil {
				t.Fatal(err)
			}
		},
		"a FIFO": func(t *testing.T, _, path string) {
			if err := unix.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"a FIFO with a reader": func(t *testing.T, _, path string) {
			if err := unix.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				buf := make([]byte, 10)
				if n, err := unix.Read(fd, buf); n > 0 {
					t.Errorf("the FIFO got %q, %v", buf[:n], err)
				}
				unix.Close(fd)
			})
		},
		"a symbolic link": func(t *testing.T, _, path string) {
			target := path + ".target"
			if err := os.WriteFile(target, []byte("foreign"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(target, path); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if data, err := os.ReadFile(target); string(data) != "foreign" {
					t.Errorf("the link's target is now %q, %v", data, err)
				}
			})
		},
		"a directory": func(t *testing.T, _, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir() + "/run"
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			put(t, dir, Path(dir))
			start := time.Now()
			write(t, dir, "a", "b")
			if took := time.Since(start); took > quick {
				t.Errorf("took %v", took)
			}
			lines := 0
			n, err := Drain(dir, func([]byte) { lines++ })
			if lines != 0 || n != 0 || (err == nil) != (name == "no directory") {
				t.Errorf("drained %d lines, %v", lines, err)
			}
			if took := time.Since(start); took > 2*quick {
				t.Errorf("the drain took %v", took)
			}
		})
	}
}

// TestLocked: somebody holds the lock. A writer waits for it once; a drain
// fails, and what it has handed on already comes again.
func TestLocked(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a")
	held, err := os.OpenFile(Path(dir), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := unix.Flock(int(held.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	w := Open(dir)
	defer w.Close()
	start := time.Now()
	for range 1000 { // 20 s, if each waited
		fmt.Fprintln(w, "b")
	}
	if took := time.Since(start); took < lockWait || took > quick {
		t.Errorf("took %v", took)
	}
	var lines []string
	if _, err := Drain(dir, func(line []byte) { lines = append(lines, string(line)) }); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("drained: %v", err)
	}
	if err := unix.Flock(int(held.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	lines = append(lines, drain(t, dir)...)
	if diff := cmp.Diff([]string{"a", "a"}, lines); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestCut: what is no whole line, as a full disk leaves it, is drained too.
func TestCut(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(Path(dir), []byte("a\n\nb"), 0o600); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a", "b"}, drain(t, dir)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestSetup: a Setup comes back out of a line of slog's, and out of nothing
// that merely looks like one.
func TestSetup(t *testing.T) {
	want := Setup{Backend: "iptables", Result: ResultOK, Reason: "map-full", Fallback: true, Seconds: 0.0125}
	var b bytes.Buffer
	log := slog.New(slog.NewJSONHandler(&b, nil))
	log.Info("x", "pod", `a","setup":{"result":"ok"}`, SetupKey, want)
	if got, ok := ParseSetup(b.Bytes()); !ok || got != want {
		t.Errorf("got %+v, %v of %s", got, ok, &b)
	}
	b.Reset()
	log.Info(`x "setup":{`, "pod", `{"setup":{"result":"ok"}}`, "other", map[string]any{SetupKey: want})
	for _, line := range []string{
		b.String(), "", "{", `"setup":{`, `{"setup":{}}`, `{"setup":{"result":"x"}}`, `{"setup":{"result":1}}`, `{"setup":{"result":"ok"}`, `{"setup":null}`,
	} {
		if got, ok := ParseSetup([]byte(line)); ok {
			t.Errorf("%s: got %+v", line, got)
		}
	}
}

func FuzzParseSetup(f *testing.F) {
	f.Add([]byte(`{"msg":"pod was set up","setup":{"backend":"ebpf","result":"ok","reason":"served","fallback":false,"seconds":0.01}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		if s, ok := ParseSetup(line); ok && s.Result != ResultOK && s.Result != ResultFailed {
			t.Errorf("%q: %+v", line, s)
		}
	})
}
