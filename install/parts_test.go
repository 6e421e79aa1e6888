// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"shunt.dev/shunt/internal/handover"
	"shunt.dev/shunt/internal/kubeapi"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/internal/testbed"
)

func TestNew(t *testing.T) {
	for _, c := range []struct {
		shape func(*Options)
		want  string
	}{
		{func(*Options) {}, ""},
		{func(o *Options) { o.BinDir = "bin" }, `cniBinDir): "bin" is not an absolute path`},
		{func(o *Options) { o.ConfDir = "" }, "cniConfDir"},
		{func(o *Options) { o.RunDir = "run" }, "runDir"},
		{func(o *Options) { o.BinariesDir = "" }, "directory of the binaries"},
		{func(o *Options) { o.Chained = false }, "cniConfFileName: none is given"},
		{func(o *Options) { o.ConfFile = "../x.conf" }, "cniConfFileName"},
		{func(o *Options) { o.ConfFile = "x.yaml" }, "cniConfFileName"},
		{func(o *Options) { o.Agent.DaemonSet = "" }, "agent"},
		{func(o *Options) { o.Entry = []byte(`{"type":"shunt-cni","datapath":"x"}`) }, "netconf: parse network configuration: datapath"},
		{func(o *Options) { o.Entry = nil }, "netconf"},
		{func(o *Options) { o.Kubeconfig.Server = "10.0.0.1" }, "kubeconfig: server"},
		{func(o *Options) { o.Kubeconfig.Path = "kubeconfig" }, "kubeconfig: path"},
		{func(o *Options) { o.Kubeconfig.TokenFile = "" }, "kubeconfig: token file"},
		{func(o *Options) { o.Kubeconfig = KubeconfigOptions{} }, ""},
	} {
		n := newNode(t)
		c.shape(&n.opts)
		in, err := New(n.opts)
		if c.want == "" {
			if err != nil || in.State().Err == nil || in.State().Installed {
				t.Errorf("%v", err)
			}
		} else if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want an error with %q", err, c.want)
		}
	}
}

// What is installed tells the plugin who the agent is, or the agent's own pod
// could not start after a reboot.
func TestAgentArg(t *testing.T) {
	for entry, args := range map[string]string{
		`{"type":"shunt-cni"}`:                                                 `{"shunt.dev/agent":"kube-system/shunt-node"}`,
		`{"type":"shunt-cni","args":{},"logLevel":"info"}`:                     `{"shunt.dev/agent":"kube-system/shunt-node"}`,
		`{"type":"shunt-cni","args":{"n":1e30,"shunt.dev/agent":"a/b","é":2}}`: `{"n":1e30,"é":2,"shunt.dev/agent":"kube-system/shunt-node"}`,
	} {
		n := newNode(t)
		n.opts.Entry = []byte(entry)
		in, err := New(n.opts)
		if err != nil {
			t.Fatal(err)
		}
		conf, err := netconf.Parse(in.opts.Entry)
		if err != nil {
			t.Fatalf("%s: %v", in.opts.Entry, err)
		}
		if conf.Redirect.Agent != n.opts.Agent || !bytes.Contains(in.opts.Entry, []byte(`"args":`+args)) {
			t.Errorf("%s became %s", entry, in.opts.Entry)
		}
	}
	n := newNode(t)
	n.opts.Entry = []byte(`{"type":"shunt-cni","args":7}`)
	if _, err := New(n.opts); err == nil || !strings.Contains(err.Error(), "args") {
		t.Errorf("args that is no object: %v", err)
	}
}

func TestRunDir(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(dir string) error
		want string
	}{
		{"none", func(string) error { return nil }, ""},
		{"as the kubelet makes it", func(dir string) error { return os.Mkdir(dir, 0o755) }, ""}, //nolint:gosec // it is so
		{"others may write it", func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o1777)) }, "can be written by others (mode 0777)"},
		{"a group may write it", func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o770)) }, "can be written by others"}, //nolint:gosec // it is so
		{"a link", func(dir string) error { return errors.Join(os.Mkdir(dir+"2", 0o700), os.Symlink(dir+"2", dir)) }, "symbolic link"},
		{"a file", func(dir string) error { return os.WriteFile(dir, nil, 0o600) }, "not a directory"},
	} {
		n := newNode(t)
		n.write(t, files{"net.d/a.conflist": plain(line)})
		if err := errors.Join(os.Mkdir(n.path("run"), 0o700), c.make(n.opts.RunDir)); err != nil {
			t.Fatal(err)
		}
		s := pass(t, n.installer(t))
		if c.want == "" {
			st, err := os.Lstat(n.opts.RunDir)
			if err != nil || st.Mode() != fs.ModeDir|0o700 || !s.Installed || s.Err != nil {
				t.Errorf("%s: %v, %+v", c.name, err, s)
			}
			continue
		}
		if s.Err == nil || !strings.Contains(s.Err.Error(), c.want) || n.read("net.d/a.conflist") != plain(line) {
			t.Errorf("%s: %+v, want an error with %q", c.name, s, c.want)
		}
	}
}

func TestBinaries(t *testing.T) {
	n := newNode(t)
	c := copier{from: n.opts.BinariesDir, to: n.opts.BinDir}
	copied := func(want bool) {
		t.Helper()
		changed, err := c.copy()
		if err != nil || changed != want {
			t.Fatalf("changed %v, %v", changed, err)
		}
		for _, name := range binaries {
			st, err := os.Lstat(n.path("bin", name))
			if err != nil || st.Mode() != 0o755 || n.read("bin/"+name) != n.read("image/"+name) {
				t.Errorf("%s: %v, %v, %q", name, st, err, n.read("bin/"+name))
			}
		}
	}
	copied(true)
	copied(false)
	c.same = nil // another process
	copied(false)
	if err := os.Chmod(n.path("bin/shunt"), 0o600); err != nil {
		t.Fatal(err)
	}
	copied(true)
	// The same size, the same moment.
	st, err := os.Stat(n.path("image/shunt-cni"))
	if err != nil {
		t.Fatal(err)
	}
	other := bytes.ToUpper([]byte(n.read("image/shunt-cni")))
	if err := errors.Join(os.WriteFile(n.path("image/shunt-cni"), other, 0o600), os.Chtimes(n.path("image/shunt-cni"), st.ModTime(), st.ModTime())); err != nil {
		t.Fatal(err)
	}
	copied(true)
	// A link is replaced, what it leads to is not.
	for _, to := range []string{n.path("elsewhere"), "shunt-cni"} {
		n.write(t, files{"elsewhere": "mine"})
		if err := errors.Join(os.Remove(n.path("bin/shunt")), os.Symlink(to, n.path("bin/shunt"))); err != nil {
			t.Fatal(err)
		}
		copied(true)
		if got := n.read("elsewhere"); got != "mine" {
			t.Errorf("what the link leads to is %q", got)
		}
	}
	large := bytes.Repeat([]byte("0123456789abcdef"), 20<<10)
	if err := os.WriteFile(n.path("image/shunt"), large, 0o600); err != nil {
		t.Fatal(err)
	}
	copied(true)
	large[len(large)-1] = 'x'
	if err := os.WriteFile(n.path("image/shunt"), large, 0o600); err != nil {
		t.Fatal(err)
	}
	copied(true)
	again := copier{from: n.opts.BinariesDir, to: n.opts.BinDir}
	for _, c := range []struct {
		want  string
		shape func() error
	}{
		{"is a directory", func() error { return errors.Join(os.Remove(n.path("bin/shunt")), os.Mkdir(n.path("bin/shunt"), 0o700)) }},
		{"not an executable file", func() error {
			return errors.Join(os.Remove(n.path("bin/shunt")), os.Chmod(n.path("image/shunt"), 0o600))
		}},
		{"is cniBinDir the runtime's", func() error {
			return errors.Join(os.Chmod(n.path("image/shunt"), 0o700), os.RemoveAll(n.path("bin"))) //nolint:gosec // as binaries are
		}},
		{"no such file", func() error { return os.Remove(n.path("image/shunt")) }},
	} {
		if err := c.shape(); err != nil {
			t.Fatal(err)
		}
		if _, err := again.copy(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want an error with %q", err, c.want)
		}
	}
}

// TestSwap has somebody write a file as fast as they can while it is edited:
// nothing that they wrote is lost.
func TestSwap(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.conflist")
	if err := os.WriteFile(path, []byte("0"), 0o604); err != nil { //nolint:gosec // to be kept
		t.Fatal(err)
	}
	if err := swap(path, []byte("1"), []byte("2")); !errors.Is(err, errChanged) {
		t.Errorf("what was not there is replaced: %v", err)
	}
	if err := swap(path+"x", []byte("1"), []byte("2")); !errors.Is(err, errChanged) {
		t.Errorf("a file that is not there: %v", err)
	}
	if err := swap(path, []byte("0"), []byte("0+")); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o604 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}

	// Somebody writes a version, and before its edit is done another one. The
	// edit of the first may never take the place of the second.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	edits, changed := 0, 0
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			was, err := readConf(path)
			if err != nil {
				t.Error(err)
				return
			}
			if bytes.HasSuffix(was, []byte("+")) {
				continue
			}
			switch err := swap(path, was, append(bytes.Clone(was), '+')); {
			case err == nil:
				edits++
			case errors.Is(err, errChanged):
				changed++
			default:
				t.Error(err)
				return
			}
		}
	})
	for i := range 500 {
		for _, version := range []string{"a", "b"} {
			temp := filepath.Join(dir, "theirs")
			err := os.WriteFile(temp, fmt.Append(nil, i, version), 0o600)
			if err := errors.Join(err, os.Rename(temp, path)); err != nil {
				t.Fatal(err)
			}
			// Not always at the same moment of the edit.
			for k := 0; version == "a" && k < i%50; k++ {
				_, _ = os.Lstat(path)
			}
		}
		want := fmt.Sprint(i, "b+")
		testbed.Eventually(t, "the edit of "+want, func() bool { is, err := readConf(path); return err == nil && string(is) == want })
	}
	close(stop)
	wg.Wait()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
	t.Logf("%d edits, %d times it was changed meanwhile", edits, changed)
}

// TestLock: two agents, as an upgrade may have them, do not meet.
func TestLock(t *testing.T) {
	dir := t.TempDir()
	release, err := lock(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := lock(ctx, dir); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second one: %v", err)
	}
	time.AfterFunc(10*time.Millisecond, release)
	second, err := lock(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	second()
}

func TestKubeconfig(t *testing.T) {
	n := newNode(t)
	k := n.opts.Kubeconfig
	k.Path = n.path("kubeconfig")
	if changed, err := k.write(); err != nil || !changed {
		t.Fatal(err)
	}
	if changed, err := k.write(); err != nil || changed {
		t.Errorf("once more: changed %v, %v", changed, err)
	}
	if err := os.Chmod(k.Path, 0o644); err != nil { //nolint:gosec // to be put right
		t.Fatal(err)
	}
	if changed, err := k.write(); err != nil || !changed {
		t.Errorf("readable by others: changed %v, %v", changed, err)
	}
	for _, c := range []struct {
		shape func(*KubeconfigOptions)
		want  []string
	}{
		{func(*KubeconfigOptions) {}, []string{`"token": "first-token"`, "certificate-authority-data", `"server": "https://10.96.0.1:443"`}},
		{func(k *KubeconfigOptions) { k.TLSServerName = "kubernetes" }, []string{`"tls-server-name": "kubernetes"`}},
		{func(k *KubeconfigOptions) { k.Insecure = true }, []string{`"insecure-skip-tls-verify": true`}},
	} {
		k := k
		c.shape(&k)
		if _, err := k.write(); err != nil {
			t.Fatal(err)
		}
		if err := kubeapi.CheckConfig(k.Path); err != nil {
			t.Error(err)
		}
		for _, w := range c.want {
			if !strings.Contains(n.read("kubeconfig"), w) {
				t.Errorf("no %s in %s", w, n.read("kubeconfig"))
			}
		}
	}
	// Without one, none of it starts.
	n.write(t, files{"net.d/a.conflist": plain(line)})
	if err := os.Remove(n.path("sa/ca.crt")); err != nil {
		t.Fatal(err)
	}
	n.write(t, files{"sa/ca.crt": "no certificate"})
	if s := pass(t, n.installer(t)); s.Installed || s.Err == nil || !strings.Contains(s.Err.Error(), "no PEM certificate") || n.read("net.d/a.conflist") != plain(line) {
		t.Errorf("%+v", s)
	}
}

// TestUninstallBinary: the plugin stays as long as a runtime may call it.
func TestUninstallBinary(t *testing.T) {
	// A result as libcni caches it.
	cached := func(n *node, id, conf string) {
		t.Helper()
		c := libcni.NewCNIConfigWithCacheDir(nil, n.path("cache"), cacheExec{})
		list, err := libcni.NetworkConfFromBytes([]byte(conf))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.AddNetworkList(t.Context(), list, &libcni.RuntimeConf{ContainerID: id, IfName: "eth0", NetNS: "/none"}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name  string
		shape func(*node)
		stays string // what the log says of the reason; "": it goes
	}{
		{"no cache to ask", func(n *node) { n.opts.CacheDir = "" }, "can't be told without the runtime's cache"},
		{"a cache that is not there", func(*node) {}, "cache can't be read"},
		{"no pods", func(n *node) { n.write(t, files{"cache/results/.keep": "{}"}) }, ""},
		{"pods of before", func(n *node) { cached(n, "a", plain(line)) }, ""},
		{"pods of before and since", func(n *node) { cached(n, "a", plain(line)); cached(n, "b", joined(line)) }, "n-b-eth0"},
		{"a result that can't be read", func(n *node) { n.write(t, files{"cache/results/n-a-eth0": "{"}) }, "n-a-eth0"},
		{"a result without a chain", func(n *node) { n.write(t, files{"cache/results/n-a-eth0": `{"cniVersion":"0.3.1","ips":[]}`}) }, ""},
		{"a redirected pod", func(n *node) {
			cached(n, "a", plain(line))
			n.write(t, files{"run/shunt/attachments/b@eth0.json": "{}"})
		}, "b@eth0.json"},
		{"a pod redirected by iptables", func(n *node) {
			cached(n, "a", plain(line))
			n.write(t, files{"run/shunt/iptables/b@eth0.json": "{}", "run/shunt/iptables/lock": ""})
		}, "b@eth0.json"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			n.opts.CacheDir = n.path("cache")
			n.write(t, files{"net.d/a.conflist": plain(line)})
			if s := pass(t, n.installer(t)); !s.Installed {
				t.Fatalf("%+v", s)
			}
			n.write(t, files{"run/shunt/agent.sock": "", "run/shunt/token": "t"})
			c.shape(n)
			pods, err := readFiles(n.opts.RunDir)
			if err != nil {
				t.Fatal(err)
			}
			// As shunt-node uninstall does it, which knows no more.
			n.opts = Options{
				BinDir: n.opts.BinDir, ConfDir: n.opts.ConfDir, RunDir: n.opts.RunDir, CacheDir: n.opts.CacheDir, Chained: true, Log: n.opts.Log,
				Kubeconfig: KubeconfigOptions{Path: n.opts.Kubeconfig.Path},
			}
			n.opts.defaults()
			for range 2 {
				if err := n.uninstall(t); err != nil {
					t.Fatal(err)
				}
			}
			want := files{}
			if c.stays != "" { // both do: the one can't remove a pod of iptables' without the other
				for _, name := range binaries {
					want[name] = "#!this is " + name
				}
			}
			got, err := readFiles(n.opts.BinDir)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("binaries (-want +got):\n%s", diff)
			}
			if log := n.logged(); !strings.Contains(log, c.stays) || strings.Contains(log, "binary stays") != (c.stays != "") {
				t.Errorf("the log has no %q:\n%s", c.stays, log)
			}
			log := n.logged()
			if plugin, larger := strings.Index(log, n.path("bin", pluginType)), strings.Index(log, n.path("bin", handover.Larger)+"\n"); c.stays == "" && (plugin < 0 || larger < plugin) {
				t.Errorf("the plugin does not go before what it hands over to:\n%s", log)
			}
			left, err := readFiles(n.opts.RunDir)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(pods.with(files{"agent": "", "agent.sock": "", "claim": "", "kubeconfig": "", "token": ""}), left); diff != "" {
				t.Errorf("run directory (-want +got):\n%s", diff)
			}
			if got := n.read("net.d/a.conflist"); got != plain(line) {
				t.Errorf("the chain is %s", got)
			}
		})
	}
	if err := Uninstall(t.Context(), Options{BinDir: "/x", ConfDir: "y", RunDir: "/z"}); err == nil || !strings.Contains(err.Error(), "cniConfDir") {
		t.Error(err)
	}
	// On a node that never had it.
	if err := Uninstall(t.Context(), Options{BinDir: t.TempDir(), ConfDir: filepath.Join(t.TempDir(), "none"), RunDir: filepath.Join(t.TempDir(), "none")}); err != nil {
		t.Error(err)
	}
}

// cacheExec stands in for plugins.
type cacheExec struct{}

func (cacheExec) ExecPlugin(context.Context, string, []byte, []string) ([]byte, error) {
	return json.Marshal(&types100.Result{CNIVersion: "1.0.0"})
}
func (cacheExec) FindInPath(plugin string, _ []string) (string, error) { return "/" + plugin, nil }

func (cacheExec) Decode([]byte) (version.PluginInfo, error) { return nil, errors.New("not asked for") }

// TestExample: what the example has Multus do is what the plugin takes.
func TestExample(t *testing.T) {
	data, err := os.ReadFile("examples/multus.yaml")
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for doc := range bytes.SplitSeq(data, []byte("\n---\n")) {
		var object struct {
			APIVersion, Kind string
			Metadata         struct {
				Name, Namespace string
				Annotations     map[string]string
			}
			Spec struct{ Config string }
		}
		if err := yaml.Unmarshal(doc, &object); err != nil {
			t.Fatal(err)
		}
		switch object.Kind {
		case "NetworkAttachmentDefinition":
			if object.APIVersion != "k8s.cni.cncf.io/v1" {
				t.Errorf("apiVersion %q", object.APIVersion)
			}
			conf, err := libcni.NetworkPluginConfFromBytes([]byte(object.Spec.Config))
			if err != nil {
				t.Fatal(err)
			}
			if conf.Network.Name != object.Metadata.Name || conf.Network.Type != pluginType {
				t.Errorf("%+v", conf.Network)
			}
			if _, err := netconf.Parse(conf.Bytes); err != nil {
				t.Error(err)
			}
			checked++
		case "Pod":
			if object.Metadata.Annotations["k8s.v1.cni.cncf.io/networks"] == "" {
				t.Error("the pod names no network")
			}
			checked++
		}
	}
	if checked != 2 {
		t.Errorf("%d of 2 objects were found", checked)
	}
}

// TestNewer: a configuration of a newer release is known for one in whatever
// form it is, so that it goes before its binary does.
func TestNewer(t *testing.T) {
	const of = `{"type":"shunt-cni","name":"shunt-cni","cniVersion":"1.0.0"`
	list := func(entry string) string {
		return `{"cniVersion":"1.0.0","name":"shunt-cni","plugins":[` + entry + `]}`
	}
	for _, c := range []struct {
		name, file, data string
		newer            bool
	}{
		{"single", "s.conf", of + "}", false},
		{"single, newer", "s.conf", of + `,"future":1}`, true},
		{"single, empty", "s.conf", "", false},
		{"list", "s.conflist", list(of + "}"), false},
		{"list, newer", "s.conflist", list(of + `,"future":1}`), true},
		{"half a list", "s.conflist", `{"cniVersion":"1.0.0","plugins":[`, false},
	} {
		p, err := decide([]confFile{{name: c.file, data: []byte(c.data)}}, wish{file: c.file, entry: []byte(`{"type":"shunt-cni"}`)})
		if err != nil || p.err != nil || p.newer != c.newer {
			t.Errorf("%s: newer is %v, want %v; %v, %v", c.name, p.newer, c.newer, err, p.err)
		}
	}
}
