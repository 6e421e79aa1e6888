// SPDX-License-Identifier: Apache-2.0

// Package answer is how the node agent learns what the plugin says of the node:
// whether pods can be set up there, as the plugin last answered STATUS. The plugin
// runs on the node itself, with the node's own programs and all rights; the agent,
// in its container, sees neither.
package answer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"shunt.dev/shunt/internal/rundir"
)

// Fresh is how long an answer counts. Kubelets have their runtime asked every
// few seconds, where runtime and configuration know STATUS at all.
const Fresh = 2 * time.Minute

// A Status is what came of a STATUS.
type Status struct {
	Able     bool   `json:"able"`     // pods can be set up
	Datapath string `json:"datapath"` // the netconf's that was asked by
	Text     string `json:"text"`     // by what, or why not: a clause

	At time.Time `json:"-"` // when it was last given
}

func path(runDir string) string { return filepath.Join(runDir, "status") }

// Write keeps an answer. One that was given before costs no writing. Nothing is
// written to a directory that others can write to, which ADD refuses too.
func Write(runDir string, s Status) error {
	if err := rundir.Check(runDir); err != nil {
		return fmt.Errorf("keep the answer to STATUS for the node agent: %w", err)
	}
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	data = append(data, '\n')
	if old, err := os.ReadFile(path(runDir)); err == nil && string(old) == string(data) {
		now := time.Now()
		if err = os.Chtimes(path(runDir), now, now); err == nil {
			return nil
		}
	}
	if err := renameio.WriteFile(path(runDir), data, 0o600); err != nil {
		return fmt.Errorf("keep the answer to STATUS for the node agent: %w", err)
	}
	return nil
}

// Read returns the last answer, nil where there has been none.
func Read(runDir string) (*Status, error) {
	st, err := os.Lstat(path(runDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // no answer is no error
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(path(runDir))
	}
	var s Status
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err != nil {
		return nil, fmt.Errorf("read the plugin's answer to STATUS, %s: %w", path(runDir), err)
	}
	s.At = st.ModTime()
	return &s, nil
}
