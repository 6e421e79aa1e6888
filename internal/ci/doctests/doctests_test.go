// SPDX-License-Identifier: Apache-2.0

// Package doctests keeps what the documents say of tests to what there is.
package doctests

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../../.."

var (
	// declared is a test's first line, named a test's name in a document, alone or
	// after its package's folder, as in `loader.TestX`.
	declared = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	named    = regexp.MustCompile("`(?:([a-z][a-z0-9/-]*)\\.)?((?:Test|Fuzz)[A-Z]\\w*)`")
)

// tests gives the folders that each test of the repository is in.
func tests(t *testing.T) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != root {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		for _, m := range declared.FindAllSubmatch(b, -1) {
			found[string(m[1])] = append(found[string(m[1])], dir)
		}
		return err
	})
	if err != nil || len(found) < 100 {
		t.Fatalf("%d tests were found: %v", len(found), err)
	}
	return found
}

// missing says what is wrong with the tests that a text names.
func missing(text string, there map[string][]string) (wrong []string) {
	for _, m := range named.FindAllStringSubmatch(text, -1) {
		switch dir, name := m[1], m[2]; {
		case len(there[name]) == 0:
			wrong = append(wrong, name+" is no test")
		case dir != "" && !slices.Contains(there[name], dir):
			wrong = append(wrong, name+" is not in "+dir)
		}
	}
	return wrong
}

// TestNames: every test that a document names is there.
func TestNames(t *testing.T) {
	there := tests(t)
	docs, err := filepath.Glob(root + "/docs/*.md")
	if err != nil || len(docs) == 0 {
		t.Fatalf("documents: %q, %v", docs, err)
	}
	for _, doc := range append(docs, root+"/README.md") {
		b, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range missing(string(b), there) {
			t.Errorf("%s: %s", filepath.Base(doc), w)
		}
	}
	if got := missing("`TestNames` `internal/ci/doctests.TestNames` `loader.TestNames` `TestNothing`", there); !slices.Equal(got, []string{"TestNames is not in loader", "TestNothing is no test"}) {
		t.Errorf("the check itself says %q", got)
	}
}

// TestClaims: every row of the tables of docs/SECURITY.md that make a claim names
// a test.
func TestClaims(t *testing.T) {
	b, err := os.ReadFile(root + "/docs/SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	claims, inTable := 0, false
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		switch {
		case !strings.HasPrefix(line, "|"):
			inTable = false
		case strings.HasSuffix(line, "| shown by |"):
			inTable = true
		case inTable && !strings.HasPrefix(line, "|-"):
			cells := strings.Split(strings.Trim(line, "|"), "|")
			if claims++; !named.MatchString(cells[len(cells)-1]) {
				t.Errorf("no test is named for: %s", line)
			}
		}
	}
	if claims < 20 {
		t.Errorf("%d claims were found", claims)
	}
}

// TestCorpus: every fuzz test has inputs that are kept.
func TestCorpus(t *testing.T) {
	for name, dirs := range tests(t) {
		if !strings.HasPrefix(name, "Fuzz") {
			continue
		}
		for _, dir := range dirs {
			if kept, err := filepath.Glob(filepath.Join(root, dir, "testdata", "fuzz", name, "*")); err != nil || len(kept) == 0 {
				t.Errorf("%s of %s has no inputs in testdata/fuzz: %v", name, dir, err)
			}
		}
	}
}
