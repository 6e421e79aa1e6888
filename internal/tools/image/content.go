// SPDX-License-Identifier: Apache-2.0

package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// What the image has, and where: install/Dockerfile has the same.
const (
	binDir     = "/opt/shunt/bin"
	entrypoint = binDir + "/shunt-node"
	searchPath = binDir + ":/usr/sbin:/usr/bin:/sbin:/bin"
)

var commands = []string{"shunt-cni", "shunt", "shunt-node"}

// multis are iptables' programs, each of many names.
var multis = map[string][]string{
	"xtables-nft-multi":    {"", "-nft"}, // the plain names are nft's, as in Debian
	"xtables-legacy-multi": {"-legacy"},
}

// programs gives the names that a multi is called by.
func programs(suffixes []string) (names []string) {
	for _, suffix := range suffixes {
		for _, family := range []string{"iptables", "ip6tables"} {
			for _, verb := range []string{"", "-restore", "-save"} {
				names = append(names, family+suffix+verb)
			}
		}
	}
	return names
}

// file is one entry of a layer: a directory, a link, or content.
type file struct {
	mode fs.FileMode
	link string
	data []byte
}

// tree is a layer's files, by their paths without the leading slash.
type tree map[string]file

// put adds a file and the directories that it is in.
func (t tree) put(name string, f file) {
	name = strings.TrimPrefix(path.Clean(name), "/")
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, ok := t[dir]; !ok {
			t[dir] = file{mode: fs.ModeDir | 0o755}
		}
	}
	t[name] = f
}

// own is the layer with this module's commands.
func own(bin string) (tree, error) {
	t := tree{}
	for _, name := range commands {
		data, err := os.ReadFile(filepath.Join(bin, name))
		if err != nil {
			return nil, fmt.Errorf("%w (make build makes it)", err)
		}
		static, err := isStatic(filepath.Join(bin, name))
		if err != nil {
			return nil, err
		}
		if !static {
			return nil, fmt.Errorf("%s is linked to libraries that a node may lack: build it with CGO_ENABLED=0", filepath.Join(bin, name))
		}
		t.put(path.Join(binDir, name), file{mode: 0o755, data: data})
	}
	return t, nil
}

func isStatic(name string) (bool, error) {
	f, err := elf.Open(name)
	if err != nil {
		return false, fmt.Errorf("%s: %w", name, err)
	}
	defer f.Close()
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }), nil
}

// host reads the system that iptables is taken from.
type host struct {
	root     string
	packages map[string]string // path below the root -> the package that it is of
}

// errNoIptables is what to do about most of what can fail here.
var errNoIptables = errors.New("install iptables (Debian and Ubuntu: apt-get install iptables)")

// system is the layer with iptables and what makes a root file system of it.
func system(root string) (tree, error) {
	h := &host{root: root}
	if err := h.readPackages(); err != nil {
		return nil, err
	}
	t := tree{}
	for _, dir := range []string{"dev", "proc", "run", "sys", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "var"} {
		t.put(dir, file{mode: fs.ModeDir | 0o755})
	}
	t.put("tmp", file{mode: fs.ModeDir | fs.ModeSticky | 0o777})
	for name, link := range map[string]string{
		"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin",
		"var/run": "/run", // where the runtimes' paths of network namespaces begin
	} {
		t.put(name, file{mode: fs.ModeSymlink | 0o777, link: link})
	}
	t.put("etc/passwd", file{mode: 0o644, data: []byte("root:x:0:0:root:/:/sbin/nologin\n")})
	t.put("etc/group", file{mode: 0o644, data: []byte("root:x:0:\n")})

	var from []string // what was copied
	for multi, suffixes := range multis {
		at, err := h.find(multi, "usr/sbin", "sbin")
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errNoIptables)
		}
		from = append(from, at)
		for _, name := range programs(suffixes) {
			t.put("usr/sbin/"+name, file{mode: fs.ModeSymlink | 0o777, link: multi})
		}
	}
	modules, err := h.modules()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errNoIptables)
	}
	from = append(from, modules...)
	if from, err = h.withLibraries(from); err != nil {
		return nil, err
	}
	for _, name := range from {
		if err := h.copyTo(t, name); err != nil {
			return nil, err
		}
	}
	return t, h.describe(t, from)
}

// modules gives iptables' extensions, which it loads by name.
func (h *host) modules() ([]string, error) {
	for _, lib := range h.libDirs() {
		entries, err := os.ReadDir(filepath.Join(h.root, lib, "xtables"))
		if err != nil {
			continue
		}
		var names []string
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".so") {
				names = append(names, path.Join(lib, "xtables", e.Name()))
			}
		}
		if len(names) != 0 {
			return names, nil
		}
	}
	return nil, fmt.Errorf("no iptables extensions (xtables/*.so) below %v of %s", h.libDirs(), h.root)
}

// libDirs are the directories that the system's dynamic loader searches.
func (h *host) libDirs() (dirs []string) {
	for _, pattern := range []string{"usr/lib/*-linux-gnu*", "lib/*-linux-gnu*"} {
		found, err := filepath.Glob(filepath.Join(h.root, pattern))
		if err != nil {
			continue // the patterns are well-formed
		}
		for _, dir := range found {
			if rel, err := filepath.Rel(h.root, dir); err == nil {
				dirs = append(dirs, rel)
			}
		}
	}
	return append(dirs, "usr/lib64", "lib64", "usr/lib", "lib")
}

// find gives the path below the root of a file in one of the directories.
func (h *host) find(name string, dirs ...string) (string, error) {
	for _, dir := range dirs {
		if _, err := os.Stat(filepath.Join(h.root, dir, name)); err == nil {
			return path.Join(dir, name), nil
		}
	}
	return "", fmt.Errorf("no %s in %v of %s", name, dirs, h.root)
}

// withLibraries adds what the files are linked to, the loader too.
func (h *host) withLibraries(files []string) ([]string, error) {
	seen := map[string]bool{}
	for i := 0; i < len(files); i++ { // it grows
		if seen[merged(files[i])] {
			files = slices.Delete(files, i, i+1)
			i--
			continue
		}
		seen[merged(files[i])] = true
		more, err := h.linkedTo(files[i])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", files[i], err)
		}
		files = append(files, more...)
	}
	slices.Sort(files)
	return files, nil
}

func (h *host) linkedTo(name string) (libs []string, err error) {
	f, err := elf.Open(filepath.Join(h.root, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		interp := make([]byte, p.Filesz)
		if _, err := p.ReadAt(interp, 0); err != nil {
			return nil, fmt.Errorf("read the loader's name: %w", err)
		}
		libs = append(libs, strings.Trim(string(interp), "/\x00"))
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return nil, fmt.Errorf("read the libraries' names: %w", err)
	}
	for _, n := range needed {
		lib, err := h.find(n, h.libDirs()...)
		if err != nil {
			return nil, err
		}
		libs = append(libs, lib)
	}
	return libs, nil
}

// merged gives a path as it is in the image, where /lib is usr/lib.
func merged(name string) string {
	switch first, _, _ := strings.Cut(name, "/"); first {
	case "bin", "sbin", "lib", "lib64":
		return "usr/" + name
	}
	return name
}

// copyTo copies a file; of a link, what it leads to.
func (h *host) copyTo(t tree, name string) error {
	data, err := os.ReadFile(filepath.Join(h.root, name))
	if err != nil {
		return err
	}
	info, err := os.Stat(filepath.Join(h.root, name))
	if err != nil {
		return err
	}
	t.put(merged(name), file{mode: info.Mode().Perm(), data: data})
	return nil
}

// readPackages reads dpkg's lists of files, where there are some.
func (h *host) readPackages() error {
	h.packages = map[string]string{}
	lists, err := filepath.Glob(filepath.Join(h.root, "var/lib/dpkg/info/*.list"))
	if err != nil {
		return err
	}
	for _, list := range lists {
		data, err := os.ReadFile(list)
		if err != nil {
			return err
		}
		pkg, _, _ := strings.Cut(strings.TrimSuffix(filepath.Base(list), ".list"), ":")
		for line := range strings.Lines(string(data)) {
			h.packages[merged(strings.Trim(line, "/\n"))] = pkg
		}
	}
	return nil
}

// describe adds what tells, to people and to scanners, of which packages the
// files are: dpkg's own records and the licences. On a system without dpkg
// there is nothing to add but its name.
func (h *host) describe(t tree, files []string) error {
	if data, err := os.ReadFile(filepath.Join(h.root, "etc/os-release")); err == nil {
		t.put("etc/os-release", file{mode: 0o644, data: data})
	}
	if len(h.packages) == 0 {
		return nil
	}
	used := map[string]bool{}
	for _, name := range files {
		target, err := filepath.EvalSymlinks(filepath.Join(h.root, name))
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(h.root, target)
		if err != nil {
			return err
		}
		pkg := h.packages[merged(rel)]
		if pkg == "" {
			pkg = h.packages[merged(name)]
		}
		if pkg == "" {
			return fmt.Errorf("/%s is of no package: iptables has to be the distribution's own", name)
		}
		used[pkg] = true
	}
	status, err := os.ReadFile(filepath.Join(h.root, "var/lib/dpkg/status"))
	if err != nil {
		return err
	}
	for stanza := range strings.SplitSeq(string(status), "\n\n") {
		first, _, _ := strings.Cut(stanza, "\n")
		pkg := strings.TrimPrefix(first, "Package: ")
		if !used[pkg] {
			continue
		}
		t.put("var/lib/dpkg/status.d/"+pkg, file{mode: 0o644, data: []byte(strings.TrimSpace(stanza) + "\n")})
		doc := "usr/share/doc/" + pkg + "/copyright"
		data, err := os.ReadFile(filepath.Join(h.root, doc))
		if errors.Is(err, fs.ErrNotExist) {
			continue // images for containers leave the documentation out
		} else if err != nil {
			return err
		}
		t.put(doc, file{mode: 0o644, data: data})
	}
	return nil
}
