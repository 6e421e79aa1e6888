// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// logTo gives a logger whose lines can be read.
func logTo(b *bytes.Buffer) *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestConfigFile: what is valid is in force, and stays when it is followed by
// what is not; each change is told once.
func TestConfigFile(t *testing.T) {
	var out bytes.Buffer
	path := filepath.Join(t.TempDir(), "netconf.json")
	f := newConfigFile(path, "/run/shunt", logTo(&out))
	now, changed := f.get()
	for _, step := range []struct {
		name, text string // "" = there is no file
		ok         bool
		says       string // /readyz
		logs       string // "" = nothing new is logged
		level      string // of what is in force
		changes    bool
	}{
		{"none", "", false, "no such file", "no such file", "", false},
		{"none still", "", false, "no such file", "", "", false},
		{"half", `{"type":"shunt-cni"`, false, "unexpected end", "unexpected end", "", false},
		{"first", `{"type":"shunt-cni"}`, true, "is in force", "in force", "warn", true},
		{"same", `{"type":"shunt-cni"}`, true, "is in force", "", "warn", false},
		{"log level", `{"type":"shunt-cni","logLevel":"debug"}`, true, "is in force", "logLevel=debug", "debug", true},
		{"bad value", `{"type":"shunt-cni","logLevel":"loud"}`, false, `logLevel: "loud" is not`, `logLevel: \"loud\" is not`, "debug", false},
		{"bad value still", `{"type":"shunt-cni","logLevel":"loud"}`, false, "the configuration before stays in force", "", "debug", false},
		{"bad key", `{"type":"shunt-cni","loglevel":"info"}`, false, `expected "logLevel"`, "expected", "debug", false},
		{"runDir", `{"type":"shunt-cni","runDir":"/var/run/x"}`, false, `runDir: "/var/run/x" is not the agent's --run-dir, "/run/shunt"`, "--run-dir", "debug", false},
		{"as before", `{"type":"shunt-cni","logLevel":"debug"}`, true, "is in force", "valid again", "debug", false},
		{"gone", "", false, "no such file", "no such file", "debug", false},
		{"back", `{"type":"shunt-cni","logLevel":"info"}`, true, "is in force", "logLevel=info", "info", true},
	} {
		t.Run(step.name, func(t *testing.T) {
			if step.text == "" {
				_ = os.Remove(path) // it may be missing already
			} else {
				write(t, path, step.text)
			}
			out.Reset()
			f.read()
			ok, says := f.condition()
			if ok != step.ok || !strings.Contains(says, step.says) {
				t.Errorf("condition: %v, %s", ok, says)
			}
			if got := out.String(); (step.logs == "") != (got == "") || !strings.Contains(got, step.logs) {
				t.Errorf("logged %q, want %q", got, step.logs)
			}
			select {
			case <-changed:
				if !step.changes {
					t.Error("told as a change")
				}
			default:
				if step.changes {
					t.Error("not told as a change")
				}
			}
			now, changed = f.get()
			level := ""
			if now != nil {
				level = now.LogLevel
			}
			if level != step.level {
				t.Errorf("logLevel in force is %q, want %q", level, step.level)
			}
		})
	}
}
