// SPDX-License-Identifier: Apache-2.0

package found

import (
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/redirect"
)

func TestFound(t *testing.T) {
	dir := t.TempDir()
	want := func(want ...redirect.PodRef) {
		t.Helper()
		got, err := Read(dir)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	want()
	pod := redirect.PodRef{Namespace: "shop", Name: "reviews", UID: "u"}
	for range 2 {
		if err := Write(dir, []redirect.PodRef{pod}); err != nil {
			t.Fatal(err)
		}
		want(pod)
	}
	if st, err := os.Stat(path(dir)); err != nil || st.Mode() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	old := time.Now().Add(-fresh - time.Second)
	if err := os.Chtimes(path(dir), old, old); err != nil {
		t.Fatal(err)
	}
	want() // its controller has gone
	if err := os.WriteFile(path(dir), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir); err == nil {
		t.Error("a list that can't be read was one")
	}
}
