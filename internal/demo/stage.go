// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// A stage lets the test bed work outside of a test: it is the testing.TB that
// the bed asks for, as far as the bed uses one. What would end a test ends the
// demo; what is made for it goes when it ends, in the reverse order.
type stage struct {
	testing.TB // nil: a method that is missing here is a panic, not a surprise

	ctx      context.Context // ends when the user wants to stop
	cleanups []func()
	failed   bool
	dir      string // of all temporary directories, once there is one
	dirs     int
}

// errStop is what a stage panics with once it has said why.
var errStop = errors.New("the demo can't go on")

func (s *stage) Helper()                    {}
func (s *stage) Name() string               { return "demo" }
func (s *stage) Context() context.Context   { return s.ctx }
func (s *stage) Failed() bool               { return s.failed }
func (s *stage) Log(args ...any)            { fmt.Fprintln(os.Stderr, args...) }
func (s *stage) Logf(f string, args ...any) { fmt.Fprintf(os.Stderr, f+"\n", args...) }

func (s *stage) Fail()    { s.failed = true }
func (s *stage) FailNow() { s.Fail(); panic(errStop) }

func (s *stage) Error(args ...any) { s.Log(args...); s.Fail() }
func (s *stage) Fatal(args ...any) { s.Log(args...); s.FailNow() }

func (s *stage) Errorf(f string, args ...any) { s.Logf(f, args...); s.Fail() }
func (s *stage) Fatalf(f string, args ...any) { s.Logf(f, args...); s.FailNow() }

func (s *stage) Cleanup(f func()) { s.cleanups = append(s.cleanups, f) }

// TempDir makes a directory that goes with the stage, in one that all of the
// stage's lie in.
func (s *stage) TempDir() string {
	if s.dir == "" {
		dir, err := os.MkdirTemp("", "shunt-demo-")
		if err != nil {
			s.Fatal(err)
		}
		s.dir = dir
		s.Cleanup(func() {
			if err := os.RemoveAll(dir); err != nil {
				s.Error(err)
			}
		})
	}
	s.dirs++
	dir := filepath.Join(s.dir, fmt.Sprintf("%03d", s.dirs))
	if err := os.Mkdir(dir, 0o777); err != nil {
		s.Fatal(err)
	}
	return dir
}

// run gives f the stage, and clears it away however f ends. It says whether
// all went well.
func (s *stage) run(f func()) bool {
	s.guard(f)
	for len(s.cleanups) > 0 { // one may add others
		last := s.cleanups[len(s.cleanups)-1]
		s.cleanups = s.cleanups[:len(s.cleanups)-1]
		s.guard(last)
	}
	return !s.failed
}

// guard runs f up to where it ends the demo.
func (s *stage) guard(f func()) {
	defer func() {
		//nolint:errorlint // what was thrown, not what it wraps
		if r := recover(); r != nil && r != errStop {
			s.Errorf("panic: %v", r)
		}
	}()
	f()
}
