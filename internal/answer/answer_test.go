// SPDX-License-Identifier: Apache-2.0

package answer

import (
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestAnswer(t *testing.T) {
	dir := t.TempDir()
	read := func() *Status {
		t.Helper()
		s, err := Read(dir)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := read(); s != nil {
		t.Errorf("an answer that nobody has given: %+v", s)
	}
	no := Status{Datapath: "auto", Text: "no BPF"}
	for _, want := range []Status{no, {Able: true, Datapath: "auto", Text: "ebpf"}, no} {
		if err := Write(dir, want); err != nil {
			t.Fatal(err)
		}
		got := read()
		if diff := cmp.Diff(want, *got, cmpopts.IgnoreFields(Status{}, "At")); diff != "" || time.Since(got.At) > time.Minute {
			t.Errorf("given at %v (-want +got):\n%s", got.At, diff)
		}
	}

	// The same again is given anew, in the same file.
	long := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path(dir), long, long); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(path(dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := Write(dir, no); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(path(dir))
	if err != nil {
		t.Fatal(err)
	}
	if !os.SameFile(before, after) || time.Since(after.ModTime()) > time.Minute {
		t.Errorf("written anew, or not given anew: %v", after.ModTime())
	}
	if mode := after.Mode().Perm(); mode != 0o600 {
		t.Errorf("mode %#o", mode)
	}

	if err := os.WriteFile(path(dir), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := Read(dir); err == nil {
		t.Errorf("half an answer is read as %+v", s)
	}
	if err := Write(dir+"/none", no); err == nil {
		t.Error("an answer is kept in a directory that is not there")
	}
}

// TestForeignDir: nothing is written to a directory into which others can put files.
func TestForeignDir(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := Write(dir, Status{Able: true}); err == nil {
		t.Error("no error")
	}
	if s, err := Read(dir); s != nil || err != nil {
		t.Errorf("what was written: %+v, %v", s, err)
	}
}
