// SPDX-License-Identifier: Apache-2.0

// Package found is how the repair controller tells `shunt status` and the node
// agent of pods that are to be redirected and that nothing is programmed for: those
// have no record by which status could know them, and only who knows the API
// server's pods can tell.
package found

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/renameio/v2"

	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/backends"
)

// fresh is how long a list counts: the controller writes one a minute.
const fresh = 5 * time.Minute

func path(runDir string) string { return filepath.Join(runDir, "unredirected") }

// Write replaces the list.
func Write(runDir string, pods []redirect.PodRef) error {
	data, err := json.Marshal(pods)
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(path(runDir), append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write the list of pods that are not redirected: %w", err)
	}
	return nil
}

// Read returns the list; none where no controller has written one of late.
func Read(runDir string) (pods []redirect.PodRef, err error) {
	st, err := os.Lstat(path(runDir))
	if errors.Is(err, fs.ErrNotExist) || err == nil && time.Since(st.ModTime()) > fresh {
		return nil, nil
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(path(runDir))
	}
	if err == nil {
		err = json.Unmarshal(data, &pods)
	}
	if err != nil {
		return nil, fmt.Errorf("read the list of pods that are not redirected, %s: %w", path(runDir), err)
	}
	return pods, nil
}

// Problem is what it is called, among the problems of pods, that nothing is
// programmed for one that is to be redirected.
const Problem = "not-redirected"

// Missing leaves, of a list, the pods that have nothing by now either.
func Missing(list []redirect.PodRef, there []backends.Status) []redirect.PodRef {
	return slices.DeleteFunc(list, func(pod redirect.PodRef) bool {
		return slices.ContainsFunc(there, func(s backends.Status) bool { return s.Pod.Namespace == pod.Namespace && s.Pod.Name == pod.Name })
	})
}
