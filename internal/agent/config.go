// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"shunt.dev/shunt/internal/netconf"
)

// configInterval is how often the netconf file is read. The kubelet takes a
// minute to bring a ConfigMap's change; a watch would gain nothing, and can be
// refused (inotify's limits are the node's).
const configInterval = 5 * time.Second

// maxNetconf bounds the file: a ConfigMap is no longer.
const maxNetconf = 1 << 20

// A config is a valid netconf, and its text: the plugin's entry.
type config struct {
	*netconf.Config
	raw []byte
}

// A configFile is the netconf as the administrator wrote it (a ConfigMap's
// file). The last valid one is in force: one that is refused changes nothing.
type configFile struct {
	path, runDir string
	log          *slog.Logger

	mu      sync.Mutex
	now     *config       // nil: there was none that is valid
	raw     []byte        // as read last
	err     error         // why that is refused
	changed chan struct{} // closed when now changes
}

func newConfigFile(path, runDir string, log *slog.Logger) *configFile {
	return &configFile{path: path, runDir: runDir, log: log, changed: make(chan struct{})}
}

// get returns the configuration in force, nil for none, and a channel that is
// closed when there is another.
func (f *configFile) get() (*config, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now, f.changed
}

// condition is what /readyz says.
func (f *configFile) condition() (ok bool, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.err != nil && f.now != nil:
		return false, fmt.Sprintf("%v; the configuration before stays in force", f.err)
	case f.err != nil:
		return false, f.err.Error()
	case f.now == nil:
		return false, f.path + " has not been read yet"
	}
	return true, f.path + " is in force"
}

// run reads the file again and again.
func (f *configFile) run(ctx context.Context, beat func()) error {
	return every(ctx, configInterval, beat, func(context.Context) { f.read() })
}

// read reads the file once, and puts it in force if it is valid.
func (f *configFile) read() {
	raw, c, err := f.load()
	f.mu.Lock()
	defer f.mu.Unlock()
	same := f.raw != nil && bytes.Equal(f.raw, raw)
	if err != nil {
		// Once for each content: the file is read for as long as it is so.
		if f.err == nil || f.err.Error() != err.Error() {
			f.log.Error("the netconf is refused", "file", f.path, "error", err, "stays in force", f.now != nil)
		}
		f.raw, f.err = raw, err
		return
	}
	if same && f.err == nil {
		return
	}
	f.raw, f.err = raw, nil
	if f.now != nil && bytes.Equal(f.now.raw, raw) {
		f.log.Info("the netconf is valid again, and what it was before", "file", f.path)
		return
	}
	f.log.Info("the netconf is in force", "file", f.path, "datapath", c.Datapath, "inboundHook", c.InboundHook,
		"logLevel", c.LogLevel, "excludeNamespaces", strings.Join(c.Redirect.ExcludeNamespaces, ","))
	f.now = c
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *configFile) load() ([]byte, *config, error) {
	raw, err := os.ReadFile(f.path)
	if err != nil {
		return nil, nil, fmt.Errorf("read the netconf: %w", err)
	}
	if len(raw) > maxNetconf {
		return nil, nil, fmt.Errorf("read the netconf: %s is longer than %d bytes", f.path, maxNetconf)
	}
	c, err := netconf.Parse(raw)
	if err != nil {
		return raw, nil, fmt.Errorf("%s: %w", f.path, err)
	}
	// The plugin would look for the agent's socket and the kubeconfig where
	// the agent does not put them.
	if c.RunDir != f.runDir {
		return raw, nil, fmt.Errorf("%s: runDir: %q is not the agent's --run-dir, %q: give both the same directory of the host", f.path, c.RunDir, f.runDir)
	}
	return raw, &config{Config: c, raw: raw}, nil
}
