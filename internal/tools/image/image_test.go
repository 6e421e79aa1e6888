// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/testbed"
)

const testName = "localhost/shunt/shunt-node:1.2.3"

func TestMain(m *testing.M) { testbed.Main(m) }

// smallCommands is a directory with small static programs in the commands'
// places: this one.
func smallCommands(t *testing.T) string {
	t.Helper()
	return commandsFrom(t, func(string) string { return "internal/tools/image" })
}

// commandsFrom is a directory with the commands, built from packages of this
// module.
func commandsFrom(t *testing.T, pkg func(name string) string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range commands {
		built, err := testbed.BuildCommand("shunt.dev/shunt/"+pkg(name), false)
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(built)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// make1 makes an image with the host's iptables, and gives the archive.
func make1(t *testing.T, bin string) (archive []byte, digest string) {
	t.Helper()
	o := options{out: filepath.Join(t.TempDir(), "image.tar"), bin: bin, name: testName, root: "/", arch: runtime.GOARCH}
	digest, size, err := build(o)
	if err != nil {
		t.Fatal(err)
	}
	archive, err = os.ReadFile(o.out)
	if err != nil {
		t.Fatal(err)
	}
	if size != int64(len(archive)) {
		t.Errorf("size %d is told, the archive has %d", size, len(archive))
	}
	entries, err := os.ReadDir(filepath.Dir(o.out))
	if err != nil || len(entries) != 1 {
		t.Errorf("beside the archive: %v %v", entries, err)
	}
	return archive, digest
}

// readTar reads a whole tar, and fails unless it is in order.
func readTar(t *testing.T, data []byte) (tree, []string) {
	t.Helper()
	files, order := tree{}, []string{}
	r := tar.NewReader(bytes.NewReader(data))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, order
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(h.Name, "/")
		if filepath.IsAbs(name) || !filepath.IsLocal(name) {
			t.Errorf("entry %q leads out", h.Name)
		}
		if _, twice := files[name]; twice {
			t.Errorf("entry %q is there twice", h.Name)
		}
		if dir := filepath.Dir(name); dir != "." && !files[dir].mode.IsDir() {
			t.Errorf("entry %q comes before its directory", h.Name)
		}
		if !h.ModTime.Equal(epoch) || h.Uid != 0 || h.Gid != 0 || h.Uname != "" || len(h.PAXRecords) != 0 {
			t.Errorf("entry %q has what differs from one machine to the next: %+v", h.Name, h)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = file{mode: h.FileInfo().Mode(), link: h.Linkname, data: content}
		order = append(order, name)
	}
}

// image is an archive, taken apart.
type image struct {
	index    index
	manifest manifest
	config   imageConfig
	layers   []tree
}

// open takes an archive apart as the specification of OCI image layouts has
// it, and verifies every digest and size.
func open(t *testing.T, archive []byte) *image {
	t.Helper()
	files, order := readTar(t, archive)
	if !slices.IsSorted(order) {
		t.Errorf("entries are not sorted: %q", order)
	}
	var layout struct{ ImageLayoutVersion string }
	decode(t, files["oci-layout"].data, &layout)
	if layout.ImageLayoutVersion != "1.0.0" {
		t.Errorf("layout version %q", layout.ImageLayoutVersion)
	}
	used := 0
	blob := func(d descriptor, mediaType string) []byte {
		used++
		f, ok := files["blobs/"+strings.Replace(d.Digest, ":", "/", 1)]
		if !ok || int64(len(f.data)) != d.Size || digestOf(f.data) != d.Digest || d.MediaType != mediaType {
			t.Fatalf("blob %+v: there %v, %d bytes, digest %s", d, ok, len(f.data), digestOf(f.data))
		}
		return f.data
	}
	var i image
	decode(t, files["index.json"].data, &i.index)
	if len(i.index.Manifests) != 1 {
		t.Fatalf("the index has %d manifests", len(i.index.Manifests))
	}
	decode(t, blob(i.index.Manifests[0], typeManifest), &i.manifest)
	decode(t, blob(i.manifest.Config, typeConfig), &i.config)
	if len(i.manifest.Layers) != len(i.config.RootFS.DiffIDs) || len(i.config.History) != len(i.manifest.Layers) {
		t.Fatal("layers, diff_ids and history are not of one number")
	}
	for n, d := range i.manifest.Layers {
		zip, err := gzip.NewReader(bytes.NewReader(blob(d, typeLayer)))
		if err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(zip)
		if err != nil {
			t.Fatal(err)
		}
		if digestOf(plain) != i.config.RootFS.DiffIDs[n] {
			t.Errorf("layer %d: diff_id %s, it is %s", n, i.config.RootFS.DiffIDs[n], digestOf(plain))
		}
		layer, _ := readTar(t, plain)
		i.layers = append(i.layers, layer)
	}
	blobs := 0
	for name, f := range files {
		if strings.HasPrefix(name, "blobs/sha256/") && !f.mode.IsDir() {
			blobs++
		}
	}
	if blobs != used {
		t.Errorf("%d blobs, %d of them used", blobs, used)
	}
	return &i
}

func decode(t *testing.T, data []byte, into any) {
	t.Helper()
	if err := json.Unmarshal(data, into); err != nil {
		t.Fatalf("%v\n%s", err, data)
	}
}

func TestLayout(t *testing.T) {
	archive, digest := make1(t, smallCommands(t))
	i := open(t, archive)
	top := i.index.Manifests[0]
	if top.Digest != digest {
		t.Errorf("digest %s is told, the manifest's is %s", digest, top.Digest)
	}
	want := map[string]string{"org.opencontainers.image.ref.name": "1.2.3", "io.containerd.image.name": testName}
	if diff := cmp.Diff(want, top.Annotations); diff != "" {
		t.Errorf("annotations (-want +got):\n%s", diff)
	}
	machine := platform{Architecture: runtime.GOARCH, OS: "linux"}
	if *top.Platform != machine || i.config.platform != machine {
		t.Errorf("platforms %v and %v", top.Platform, i.config.platform)
	}
	if !slices.Equal(i.config.Config.Entrypoint, []string{"/opt/shunt/bin/shunt-node"}) || !slices.Contains(i.config.Config.Env, "PATH="+searchPath) {
		t.Errorf("configuration %+v", i.config.Config)
	}

	files := tree{}
	for _, layer := range i.layers {
		for name, f := range layer {
			files[name] = f
		}
	}
	for _, name := range []string{"opt/shunt/bin/shunt-cni", "opt/shunt/bin/shunt", "opt/shunt/bin/shunt-node", "usr/sbin/xtables-nft-multi", "usr/sbin/xtables-legacy-multi"} {
		if f := files[name]; f.mode != 0o755 || len(f.data) == 0 {
			t.Errorf("%s: mode %v, %d bytes", name, f.mode, len(f.data))
		}
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for suffix, multi := range map[string]string{"": "xtables-nft-multi", "-nft": "xtables-nft-multi", "-legacy": "xtables-legacy-multi"} {
			for _, verb := range []string{"", "-restore", "-save"} {
				if got := files["usr/sbin/"+family+suffix+verb].link; got != multi {
					t.Errorf("%s is a link to %q", family+suffix+verb, got)
				}
			}
		}
	}
	// What the rules are made of.
	for _, extension := range []string{"libxt_owner", "libxt_tcp", "libxt_mark", "libxt_socket", "libxt_TPROXY", "libxt_CT", "libxt_conntrack", "libxt_multiport"} {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(files)), func(name string) bool { return strings.HasSuffix(name, "/xtables/"+extension+".so") }) {
			t.Errorf("no %s", extension)
		}
	}
	for link, to := range map[string]string{"var/run": "/run", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin", "bin": "usr/bin"} {
		if f := files[link]; f.mode&fs.ModeSymlink == 0 || f.link != to {
			t.Errorf("%s: %v, to %q", link, f.mode, f.link)
		}
	}
	if f := files["tmp"]; !f.mode.IsDir() || f.mode&fs.ModeSticky == 0 {
		t.Errorf("tmp: %v", f.mode)
	}
	for name, f := range files {
		if f.mode&(fs.ModeSetuid|fs.ModeSetgid) != 0 || f.mode.IsRegular() && f.mode&0o022 != 0 {
			t.Errorf("%s: mode %v", name, f.mode)
		}
	}
}

func TestReproducible(t *testing.T) {
	one, _ := make1(t, smallCommands(t))
	two, _ := make1(t, smallCommands(t))
	if !bytes.Equal(one, two) {
		t.Error("two images of the same input differ")
	}
}

func TestPackagesAreNamed(t *testing.T) {
	archive, _ := make1(t, smallCommands(t))
	base := open(t, archive).layers[0]
	f, ok := base["var/lib/dpkg/status.d/iptables"]
	if !ok || !strings.HasPrefix(string(f.data), "Package: iptables\n") || !strings.Contains(string(f.data), "\nVersion: ") {
		t.Errorf("dpkg's record of iptables: %q", f.data)
	}
}

func TestErrors(t *testing.T) {
	bin, empty := smallCommands(t), t.TempDir()
	noModules := t.TempDir()
	for _, name := range []string{"xtables-nft-multi", "xtables-legacy-multi"} {
		if err := os.MkdirAll(filepath.Join(noModules, "usr/sbin"), 0o755); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(filepath.Join("/usr/sbin", name))
		if err == nil {
			err = os.WriteFile(filepath.Join(noModules, "usr/sbin", name), data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	noLibraries := t.TempDir()
	if err := os.CopyFS(noLibraries, os.DirFS(noModules)); err != nil {
		t.Fatal(err)
	}
	module := filepath.Join(noLibraries, "usr/lib/xtables/libxt_tcp.so")
	if err := os.MkdirAll(filepath.Dir(module), 0o755); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(bin, "shunt")) // an ELF file; which, is not looked at
	if err == nil {
		err = os.WriteFile(module, data, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		o    options
		want string
	}{
		"no commands":   {options{bin: empty, root: "/", name: testName}, "make build"},
		"no iptables":   {options{bin: bin, root: empty, name: testName}, "apt-get install iptables"},
		"no extensions": {options{bin: bin, root: noModules, name: testName}, "no iptables extensions"},
		"no libraries":  {options{bin: bin, root: noLibraries, name: testName}, "libxtables.so"},
		"no tag":        {options{bin: bin, root: "/", name: "registry.example:5000/shunt-node"}, "is not NAME:TAG"},
	} {
		out := filepath.Join(t.TempDir(), "image.tar")
		c.o.out, c.o.arch = out, runtime.GOARCH
		_, _, err := build(c.o)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, it should say %q", name, err, c.want)
		}
		if entries, _ := os.ReadDir(filepath.Dir(out)); len(entries) != 0 {
			t.Errorf("%s: leaves %v", name, entries)
		}
	}
	// A command that needs libraries is one that the runtime can't start on
	// every node.
	linked := t.TempDir()
	if err := os.CopyFS(linked, os.DirFS(bin)); err != nil {
		t.Fatal(err)
	}
	if data, err = os.ReadFile("/usr/sbin/xtables-nft-multi"); err == nil {
		err = os.WriteFile(filepath.Join(linked, "shunt-cni"), data, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := own(linked); err == nil || !strings.Contains(err.Error(), "CGO_ENABLED=0") {
		t.Errorf("a command that is linked to libraries: %v", err)
	}
}

// TestDockerfile: install/Dockerfile makes an image with the same in the same
// places.
func TestDockerfile(t *testing.T) {
	data, err := os.ReadFile("../../../install/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	_, final, ok := strings.Cut(text, "\nFROM ")
	for ok {
		var more string
		if _, more, ok = strings.Cut(final, "\nFROM "); ok {
			final = more
		}
	}
	for _, want := range []string{
		`ENTRYPOINT ["` + entrypoint + `"]`,
		"ENV PATH=" + searchPath,
		binDir + "/\n",
	} {
		if !strings.Contains(final, want) {
			t.Errorf("the last stage lacks %q", want)
		}
	}
	if !regexp.MustCompile(`apt-get install [^\n]*\biptables\b`).MatchString(final) {
		t.Error("the last stage installs no iptables")
	}
	for _, name := range commands {
		if !regexp.MustCompile(`COPY --from=build [^\n]*/` + name + `( |\n)`).MatchString(final) {
			t.Errorf("the last stage does not copy %s", name)
		}
	}
}
