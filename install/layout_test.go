// SPDX-License-Identifier: Apache-2.0

package install

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// Configurations of others. A %s is where the entry is to be.
const (
	calico = `{
  "name": "k8s-pod-network",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "calico",
      "datastore_type": "kubernetes",
      "mtu": 0,
      "kubernetes": {"kubeconfig": "/etc/cni/net.d/calico-kubeconfig"}
    },
    {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}%s
  ]
}
`
	cilium = "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"cilium\",\n  \"plugins\": [\n    {\n       \"type\": \"cilium-cni\",\n       \"enable-debug\": false\n    }%s\n  ]\n}"
	line   = `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}%s]}`
	single = "{\n  \"cniVersion\": \"0.4.0\",\n  \"name\": \"old\",\n  \"type\": \"bridge\",\n  \"n\": 12345678901234567890123\n}\n"
	multus = `{"cniVersion":"0.3.1","name":"multus-cni-network","type":"multus-shim","clusterNetwork":"/etc/cni/net.d/10-calico.conflist"}`
)

// at puts what stands for the entry into a configuration.
func at(conf, entry string) string { return strings.Replace(conf, "%s", entry, 1) }

// entryIn is what stands in each of them for the entry.
var entryIn = map[string]string{
	calico: ",\n    " + testEntry,
	cilium: ",\n    {\n       \"type\": \"shunt-cni\",\n       \"logLevel\": \"warn\"\n    }",
	line:   "," + testEntry,
}

func plain(conf string) string  { return at(conf, "") }
func joined(conf string) string { return at(conf, entryIn[conf]) }

// wrapped is the list made of a single configuration.
func wrapped(from, cniVersion, name, conf string) string {
	return "{\n  \"shunt.dev/from\": \"" + from + "\",\n  \"cniVersion\": \"" + cniVersion + "\",\n  \"name\": \"" + name + "\",\n  \"plugins\": [\n    " +
		strings.TrimSpace(conf) + ",\n    {\n      \"type\": \"shunt-cni\",\n      \"logLevel\": \"warn\"\n    }\n  ]\n}\n"
}

func TestLayouts(t *testing.T) {
	const standalone = "{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"shunt\",\n  \"type\": \"shunt-cni\",\n  \"logLevel\": \"warn\"\n}\n"
	own := func(o *Options) { o.Chained, o.ConfFile = false, "shunt-cni.conf" }
	for _, c := range []struct {
		name   string
		opts   func(*Options)
		before files
		change files  // what installing changes; a file that is "" is gone
		file   string // that has the entry; "": not installed
		err    string // what the state says
		log    string // what the log says
		unused bool   // a runtime that reads the directory would use another file
		// after is what differs from before when it is uninstalled.
		after files
	}{
		{name: "none", err: "there is no usable .conf, .conflist or .json file"},
		{name: "a list", before: files{"10-calico.conflist": plain(calico)}, change: files{"10-calico.conflist": joined(calico)}, file: "10-calico.conflist"},
		{name: "a list without an end of line", before: files{"05-cilium.conflist": plain(cilium)}, change: files{"05-cilium.conflist": joined(cilium)}, file: "05-cilium.conflist"},
		{name: "a list on one line", before: files{"a.conflist": plain(line)}, change: files{"a.conflist": joined(line)}, file: "a.conflist"},
		{
			name: "several", before: files{"20-b.conflist": plain(line), "10-a.conflist": plain(calico), "30-c.conf": single, "README": "no", "calico-kubeconfig": "x"},
			change: files{"10-a.conflist": joined(calico)}, file: "10-a.conflist",
		},
		{
			name: "a single one", before: files{"10-old.conf": single, "99-loopback.conf": `{"cniVersion":"0.3.1","name":"lo","type":"loopback"}`},
			change: files{"10-old-shunt.conflist": wrapped("10-old.conf", "0.4.0", "old", single)}, file: "10-old-shunt.conflist",
		},
		{
			name: "a single one by .json", before: files{"10-old.json": single},
			change: files{"10-old-shunt.conflist": wrapped("10-old.json", "0.4.0", "old", single)}, file: "10-old-shunt.conflist",
		},
		{
			name: "a single one and a list of the same name", before: files{"10-old.conf": single, "10-old.conflist": plain(line)},
			change: files{"10-old-shunt.conflist": wrapped("10-old.conf", "0.4.0", "old", single)}, file: "10-old-shunt.conflist",
		},
		{
			name: "a single one without a version", before: files{"k.conf": `{"name":"kubenet","type":"bridge"}`},
			change: files{"k-shunt.conflist": wrapped("k.conf", "0.3.1", "kubenet", `{"name":"kubenet","type":"bridge"}`)}, file: "k-shunt.conflist", log: "older than lists",
		},
		{
			name: "a single one, changed since", before: files{"10-old.conf": single, "10-old-shunt.conflist": wrapped("10-old.conf", "0.4.0", "old", `{"type":"was"}`)},
			change: files{"10-old-shunt.conflist": wrapped("10-old.conf", "0.4.0", "old", single)}, file: "10-old-shunt.conflist", after: files{"10-old-shunt.conflist": ""},
		},
		{
			name: "a list whose origin is gone", before: files{"10-old-shunt.conflist": wrapped("10-old.conf", "0.4.0", "old", single)},
			change: files{"10-old-shunt.conflist": ""}, err: "there is no usable", after: files{"10-old-shunt.conflist": ""},
		},
		{
			name: "somebody's file has the name of the list to make", before: files{"10-old.conf": single, "10-old-shunt.conflist": plain(line)},
			change: files{"10-old-shunt.conflist": joined(line)}, file: "10-old-shunt.conflist",
		},
		{
			name: "Multus delegates", before: files{"00-multus.conf": multus, "10-calico.conflist": joined(calico)},
			change: files{"00-multus-shunt.conflist": wrapped("00-multus.conf", "0.3.1", "multus-cni-network", multus), "10-calico.conflist": plain(calico)},
			file:   "00-multus-shunt.conflist", after: files{"10-calico.conflist": plain(calico)},
		},
		{
			name: "a new one comes before it", before: files{"05-new.conflist": plain(line), "10-calico.conflist": joined(calico)},
			change: files{"05-new.conflist": joined(line), "10-calico.conflist": plain(calico)}, file: "05-new.conflist", after: files{"10-calico.conflist": plain(calico)},
		},
		{
			name: "bad JSON before it", before: files{"00-bad.conflist": "{", "10-a.conflist": plain(line)},
			change: files{"10-a.conflist": joined(line)}, file: "10-a.conflist", log: "00-bad.conflist",
		},
		{name: "bad JSON alone", before: files{"00-bad.conf": "}"}, err: "there is no usable", log: "containerd goes no further"},
		{name: "an empty file", before: files{"00.conflist": "", "10-a.conflist": plain(line)}, change: files{"10-a.conflist": joined(line)}, file: "10-a.conflist", log: "00.conflist"},
		{
			name: "no plugins, no type, a list as .conf", file: "10-a.conflist", log: "missing 'type'",
			before: files{"00.conflist": `{"name":"n","plugins":[]}`, "01.conf": `{"name":"n"}`, "02.conf": plain(line), "03.conflist": single, "10-a.conflist": plain(line)},
			change: files{"10-a.conflist": joined(line)},
		},
		{
			name: "a mark before the JSON", before: files{"00.conflist": "\ufeff" + plain(line), "10-a.conflist": plain(line)},
			change: files{"10-a.conflist": joined(line)}, file: "10-a.conflist", log: "00.conflist",
		},
		{name: "CRLF", before: files{"a.conflist": strings.ReplaceAll(plain(cilium), "\n", "\r\n")}, change: files{"a.conflist": strings.ReplaceAll(joined(cilium), "\n", "\r\n")}, file: "a.conflist"},
		{name: "tabs", before: files{"a.conflist": strings.ReplaceAll(plain(cilium), "  ", "\t")}, change: files{"a.conflist": strings.ReplaceAll(joined(cilium), "  ", "\t")}, file: "a.conflist"},
		{
			name: "keys twice, escapes, large numbers", file: "a.conflist",
			before: files{"a.conflist": `{"name":"n","plugins":{"plugins":[]},"pl\u0075gins":[{"type":"\u0062","n":1e30,"n":123456789012345678901}],"cniVersion":"0.1.0","cniVersion":"1.0.0"}`},
			change: files{"a.conflist": `{"name":"n","plugins":{"plugins":[]},"pl\u0075gins":[{"type":"\u0062","n":1e30,"n":123456789012345678901},` + testEntry + `],"cniVersion":"0.1.0","cniVersion":"1.0.0"}`},
		},
		{
			name: "a number that runtimes can't read", before: files{"00.conflist": `{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a","n":1e999}]}`, "10-a.conflist": plain(line)},
			change: files{"10-a.conflist": joined(line)}, file: "10-a.conflist", log: "1e999",
		},
		{
			name: "there already", before: files{"10-calico.conflist": joined(calico)},
			file: "10-calico.conflist", after: files{"10-calico.conflist": plain(calico)},
		},
		{
			name: "there, of another release", before: files{"a.conflist": at(line, `,{"type":"shunt-cni","logLevel":"debug","fromTheFuture":1}`)}, change: files{"a.conflist": joined(line)},
			file: "a.conflist", after: files{"a.conflist": plain(line)},
		},
		{
			name: "there twice", before: files{"a.conflist": at(line, `,{"type":"shunt-cni"}, {"type":"shunt-cni"}`)}, change: files{"a.conflist": joined(line)},
			file: "a.conflist", after: files{"a.conflist": plain(line)},
		},
		{
			name: "there, not last", before: files{"a.conflist": at(line, `,{"type":"shunt-cni"}, {"type":"tuning"}`)}, change: files{"a.conflist": at(line, `, {"type":"tuning"}, `+testEntry)},
			file: "a.conflist", after: files{"a.conflist": at(line, `, {"type":"tuning"}`)},
		},
		{
			name: "a link", before: files{"10-a.conflist": "-> ../conf/a", "../conf/a": plain(line)},
			change: files{"../conf/a": joined(line)}, file: "10-a.conflist",
		},
		{
			name: "a link to a single one", before: files{"10-a.conf": "-> ../conf/a", "../conf/a": single},
			change: files{"10-a-shunt.conflist": wrapped("10-a.conf", "0.4.0", "old", single)}, file: "10-a-shunt.conflist",
		},
		{
			name: "a link that leads nowhere", before: files{"00.conflist": "-> none", "10-a.conflist": plain(line)},
			change: files{"10-a.conflist": joined(line)}, file: "10-a.conflist", log: "symbolic link to none, which is not there",
		},
		{
			name: "a link that leads out of what the agent sees", before: files{"00.conflist": "-> /nowhere/on/this/node", "10-a.conflist": plain(line)},
			err: "mount that too",
		},
		{name: "a directory with such a name", before: files{"00.conflist/x": "", "10-a.conflist": plain(line)}, change: files{"10-a.conflist": joined(line)}, file: "10-a.conflist"},
		{name: "a list too old for the plugin", before: files{"a.conflist": `{"name":"n","cniVersion":"0.2.0","plugins":[{"type":"a"}]}`}, err: "the plugin would refuse every pod: parse network configuration: cniVersion"},
		{name: "a list without a version", before: files{"a.conflist": `{"name":"n","plugins":[{"type":"a"}]}`}, err: "cniVersion"},
		{name: "a list too new for the plugin", before: files{"a.conflist": `{"name":"n","cniVersion":"9.9.9","plugins":[{"type":"a"}]}`}, err: "cniVersion"},
		{name: "several versions", before: files{"a.conflist": `{"name":"n","cniVersions":["0.4.0","1.0.0"],"plugins":[{"type":"a"}]}`}, change: files{"a.conflist": `{"name":"n","cniVersions":["0.4.0","1.0.0"],"plugins":[{"type":"a"},` + testEntry + `]}`}, file: "a.conflist"},
		{name: "only ours", before: files{"shunt-cni.conf": standalone, "z.conflist": `{"cniVersion":"1.0.0","name":"s","plugins":[` + testEntry + `]}`}, err: "there is no usable", log: "no plugin but shunt-cni"},
		{
			name: "named", opts: func(o *Options) { o.ConfFile = "20-b.conflist" }, before: files{"10-a.conflist": joined(calico), "20-b.conflist": plain(line)},
			change: files{"10-a.conflist": plain(calico), "20-b.conflist": joined(line)}, file: "20-b.conflist", log: "runtimes take 10-a.conflist", unused: true, after: files{"10-a.conflist": plain(calico)},
		},
		{
			name: "named, and not there", opts: func(o *Options) { o.ConfFile = "20-b.conflist" }, before: files{"10-a.conflist": joined(calico)},
			err: "20-b.conflist is not there", after: files{"10-a.conflist": plain(calico)},
		},
		{name: "named, and not valid", opts: func(o *Options) { o.ConfFile = "20-b.conflist" }, before: files{"20-b.conflist": "{"}, err: "20-b.conflist is not usable"},
		{
			name: "named as a single one, and a list", opts: func(o *Options) { o.ConfFile = "10-a.conf" }, before: files{"10-a.conflist": plain(calico)},
			change: files{"10-a.conflist": joined(calico)}, file: "10-a.conflist",
		},
		{
			name: "named, a single one", opts: func(o *Options) { o.ConfFile = "10-old.conf" }, before: files{"10-old.conf": single},
			change: files{"10-old-shunt.conflist": wrapped("10-old.conf", "0.4.0", "old", single)}, file: "10-old-shunt.conflist",
		},
		{
			name: "named; something unreadable before it", opts: func(o *Options) { o.ConfFile = "20-b.conflist" }, before: files{"00.conflist": "-> /nowhere/on/this/node", "20-b.conflist": plain(line)},
			change: files{"20-b.conflist": joined(line)}, file: "20-b.conflist",
		},
		{name: "standalone", opts: own, change: files{"shunt-cni.conf": standalone}, file: "shunt-cni.conf", after: files{}},
		{
			name: "standalone beside a chain it was in", opts: own, before: files{"10-a.conflist": joined(line), "10-old-shunt.conflist": wrapped("10-old.conf", "0.4.0", "old", single), "10-old.conf": single},
			change: files{"shunt-cni.conf": standalone, "10-a.conflist": plain(line), "10-old-shunt.conflist": ""}, file: "shunt-cni.conf", unused: true, after: files{"10-a.conflist": plain(line), "10-old-shunt.conflist": ""},
		},
		{
			name: "standalone, of another release", opts: own, before: files{"shunt-cni.conf": `{"type":"shunt-cni","name":"s","future":1}`},
			change: files{"shunt-cni.conf": standalone}, file: "shunt-cni.conf", after: files{"shunt-cni.conf": ""},
		},
		{name: "standalone, empty", opts: own, before: files{"shunt-cni.conf": ""}, change: files{"shunt-cni.conf": standalone}, file: "shunt-cni.conf", after: files{"shunt-cni.conf": ""}},
		{name: "standalone, where somebody's is", opts: own, before: files{"shunt-cni.conf": single}, err: "shunt-cni.conf is not shunt's: it has type bridge"},
		{
			name: "standalone as a list", opts: func(o *Options) { o.Chained, o.ConfFile = false, "s.conflist" }, file: "s.conflist",
			change: files{"s.conflist": "{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"shunt\",\n  \"plugins\": [\n    {\n      \"type\": \"shunt-cni\",\n      \"logLevel\": \"warn\"\n    }\n  ]\n}\n"},
		},
		{name: "standalone as a list, where somebody's is", opts: func(o *Options) { o.Chained, o.ConfFile = false, "s.conflist" }, before: files{"s.conflist": plain(line)}, err: "it has a plugin of type bridge"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			if c.opts != nil {
				c.opts(&n.opts)
			}
			if err := c.before.write(n.opts.ConfDir); err != nil {
				t.Fatal(err)
			}
			before := n.conf(t)
			in := n.installer(t)
			s := pass(t, in)
			if diff := cmp.Diff(before.with(c.change), n.conf(t)); diff != "" {
				t.Fatalf("installed (-want +got):\n%s", diff)
			}
			if c.file != "" {
				if !s.Installed || s.Err != nil || s.File != filepath.Join(n.opts.ConfDir, c.file) {
					t.Fatalf("%+v", s)
				}
				if !c.unused {
					if err := checkUse(n.opts.ConfDir); err != nil {
						t.Errorf("what a runtime makes of it: %v", err)
					}
				}
			} else if s.Installed || s.Err == nil || !strings.Contains(s.Err.Error(), c.err) {
				t.Errorf("%+v; want an error with %q", s, c.err)
			}
			if log := n.logged(); !strings.Contains(log, c.log) {
				t.Errorf("the log says nothing of %q:\n%s", c.log, log)
			}
			// Once more: nothing is written, and nothing said.
			inodes, said := n.inodes(t), n.logged()
			pass(t, in)
			if diff := cmp.Diff(inodes, n.inodes(t)); diff != "" {
				t.Errorf("files that were written again (-before +after):\n%s", diff)
			}
			if again := n.logged(); again != said {
				t.Errorf("said again:\n%s", again[len(said):])
			}
			if err := n.uninstall(t); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(before.with(c.after), n.conf(t)); diff != "" {
				t.Errorf("uninstalled (-want +got):\n%s", diff)
			}
		})
	}
}

// conf is what is in the directory of the CNI configuration, and in that which
// links lead to.
func (n *node) conf(t *testing.T) files {
	t.Helper()
	out, err := readFiles(n.opts.ConfDir)
	if err != nil {
		t.Fatal(err)
	}
	more, err := readFiles(n.path("conf"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for name, content := range more {
		out["../conf/"+name] = content
	}
	return out
}

// inodes tells files apart, those of all directories.
func (n *node) inodes(t *testing.T) map[string]uint64 {
	t.Helper()
	out := map[string]uint64{}
	err := filepath.WalkDir(n.root, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		out[path] = st.Ino
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
