// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"log/slog"
	"maps"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// A node is the directories of one.
type node struct {
	root string
	opts Options

	mu      sync.Mutex
	log     bytes.Buffer
	results []string
}

// ca is a certificate in PEM.
var ca = sync.OnceValue(func() []byte {
	srv := httptest.NewTLSServer(nil)
	defer srv.Close()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
})

func (n *node) path(elem ...string) string {
	return filepath.Join(append([]string{n.root}, elem...)...)
}

// makeNode makes the directories below root, where they are not there yet.
func makeNode(root string) (*node, error) {
	n := &node{root: root}
	n.options()
	for _, dir := range []string{"bin", "net.d", "image"} {
		if err := os.MkdirAll(n.path(dir), 0o755); err != nil {
			return nil, err
		}
	}
	for _, name := range binaries {
		if err := os.WriteFile(n.path("image", name), []byte("#!this is "+name), 0o755); err != nil { //nolint:gosec // as binaries are
			return nil, err
		}
	}
	return n, n.serviceAccount("first-token")
}

// options sets those of a node.
func (n *node) options() {
	n.opts = Options{
		BinDir: n.path("bin"), ConfDir: n.path("net.d"), RunDir: n.path("run", "shunt"), BinariesDir: n.path("image"),
		Chained: true, Entry: []byte(testEntry), Agent: redirect.AgentRef{Namespace: "kube-system", DaemonSet: "shunt-node"},
		Kubeconfig: KubeconfigOptions{
			Path: n.path("run", "shunt", "kubeconfig"), Server: "https://10.96.0.1:443",
			CAFile: n.path("sa", "ca.crt"), TokenFile: n.path("sa", "token"),
		},
		OnResult: func(r string) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.results = append(n.results, r)
		},
	}
	n.opts.Log = slog.New(slog.NewTextHandler(n, nil))
}

// serviceAccount has the token be served as the kubelet does: a new directory,
// and a link that is replaced.
func (n *node) serviceAccount(token string) error {
	sa := n.path("sa")
	if err := os.MkdirAll(sa, 0o755); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(sa, "..2026")
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{"token": []byte(token), "ca.crt": ca()} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(sa, name)); err != nil && !os.IsExist(err) {
			return err
		}
	}
	old, _ := os.Readlink(filepath.Join(sa, "..data"))
	if err := os.Symlink(filepath.Base(dir), filepath.Join(sa, "..data_tmp")); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(sa, "..data_tmp"), filepath.Join(sa, "..data")); err != nil {
		return err
	}
	if old != "" {
		return os.RemoveAll(filepath.Join(sa, old))
	}
	return nil
}

func newNode(t *testing.T) *node {
	t.Helper()
	n, err := makeNode(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Write takes the log.
func (n *node) Write(p []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.log.Write(p)
}

func (n *node) logged() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.log.String()
}

func (n *node) told() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.results)
}

// testTimes are short, and settle nothing.
var testTimes = times{
	verify: 10 * time.Second, gap: time.Millisecond, retry: 5 * time.Millisecond, retryMax: 100 * time.Millisecond,
	quick: time.Second, calm: 200 * time.Millisecond, back: 20 * time.Millisecond,
}

// starts has each installer be of a later process than the one before.
var starts atomic.Int64

func (n *node) installer(t *testing.T) *Installer {
	t.Helper()
	in, err := New(n.opts)
	if err != nil {
		t.Fatal(err)
	}
	in.times, in.fight.times = testTimes, testTimes
	in.start = starts.Add(1)
	t.Cleanup(in.release)
	in.opts.Entry = n.opts.Entry // layouts have it as it was given; TestAgentArg has the rest
	return in
}

// pass has the installer look once.
func pass(t *testing.T, in *Installer) State {
	t.Helper()
	in.report(in.pass(t.Context()))
	return in.State()
}

func (n *node) uninstall(t *testing.T) error {
	t.Helper()
	return n.opts.uninstall(t.Context(), testTimes)
}

// files are those of a directory by name: content, or "-> " and where a link
// leads. A name with a slash is of a directory beside it.
type files map[string]string

func (f files) write(dir string) error {
	for name, content := range f {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		var err error
		if to, ok := strings.CutPrefix(content, "-> "); ok {
			err = os.Symlink(to, path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o640)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func readFiles(dir string) (files, error) {
	out := files{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.Type()&os.ModeSymlink != 0 {
			to, err := os.Readlink(path)
			out[name] = "-> " + to
			return err
		}
		if !d.Type().IsRegular() {
			out[name] = d.Type().String()
			return nil
		}
		data, err := os.ReadFile(path)
		out[name] = string(data)
		return err
	})
	return out, err
}

// with is f but for the files of g; those that are "" there are gone.
func (f files) with(g files) files {
	out := maps.Clone(f)
	for name, content := range g {
		if out[name] = content; content == "" {
			delete(out, name)
		}
	}
	return out
}

// checkUse fails unless a runtime that reads dir would use a chain whose last
// plugin is ours and takes what the runtime hands to it.
func checkUse(dir string) error {
	list, err := inUse(dir)
	if err != nil {
		return err
	}
	for i, p := range list.Plugins {
		if (p.Network.Type == pluginType) != (i == len(list.Plugins)-1) {
			return fmt.Errorf("plugin %d is of type %s", i, p.Network.Type)
		}
	}
	handed, err := libcni.InjectConf(list.Plugins[len(list.Plugins)-1], map[string]any{"name": list.Name, "cniVersion": list.CNIVersion})
	if err != nil {
		return err
	}
	_, err = netconf.Parse(handed.Bytes)
	return err
}

// inUse is the configuration that a runtime takes: the first that is valid.
func inUse(dir string) (*libcni.NetworkConfigList, error) {
	paths, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil, err
	}
	slices.Sort(paths)
	for _, path := range paths {
		if strings.HasSuffix(path, ".conflist") {
			if list, err := libcni.ConfListFromFile(path); err == nil {
				return list, nil
			}
			continue
		}
		//nolint:staticcheck // runtimes use it
		conf, err := libcni.ConfFromFile(path)
		if err != nil {
			continue
		}
		//nolint:staticcheck // runtimes use it
		if list, err := libcni.ConfListFromConf(conf); err == nil {
			return list, nil
		}
	}
	return nil, os.ErrNotExist
}
