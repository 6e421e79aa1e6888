// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"shunt.dev/shunt/internal/testbed"
)

// container is an image, unpacked.
type container struct {
	root string
	conf execution
}

// unpack unpacks an image as a container runtime does: layer over layer.
func unpack(t *testing.T, i *image) *container {
	t.Helper()
	c := &container{root: t.TempDir(), conf: i.config.Config}
	for _, layer := range i.layers {
		for name, f := range layer {
			at := filepath.Join(c.root, name)
			err := os.MkdirAll(filepath.Dir(at), 0o755)
			switch {
			case err != nil:
			case f.mode.IsDir():
				err = os.MkdirAll(at, 0o755)
			case f.mode&fs.ModeSymlink != 0:
				err = os.Symlink(f.link, at)
			default:
				err = os.WriteFile(at, f.data, f.mode.Perm())
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return c
}

// run runs a program in the container's root, and in a network namespace that
// ends with it. A name without a slash is looked up as in the container.
func (c *container) run(t *testing.T, stdin string, argv ...string) (string, error) {
	t.Helper()
	var found string
	for dir := range strings.SplitSeq(strings.TrimPrefix(c.conf.Env[0], "PATH="), ":") {
		if found = path.Join(dir, argv[0]); path.IsAbs(argv[0]) {
			found = argv[0]
		}
		if _, err := os.Lstat(filepath.Join(c.root, found)); err == nil {
			break
		}
	}
	var out bytes.Buffer
	cmd := &exec.Cmd{
		Path: found, Args: argv, Env: append(c.conf.Env, "XTABLES_LOCKFILE=/tmp/lock"), Dir: "/",
		Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &out,
		SysProcAttr: &syscall.SysProcAttr{Chroot: c.root, Cloneflags: syscall.CLONE_NEWNET},
	}
	err := cmd.Run()
	return out.String(), err
}

// TestPrivilegedImage runs, in the image's root, what the agent and repair run
// there: the commands, and iptables of both kinds with rules of a pod.
func TestPrivilegedImage(t *testing.T) {
	testbed.Privileged(t)
	bin := commandsFrom(t, func(name string) string { return "cmd/" + name })
	archive, _ := make1(t, bin)
	c := unpack(t, open(t, archive))
	t.Logf("the archive has %.1f MiB", float64(len(archive))/(1<<20))

	for _, argv := range [][]string{
		{entrypoint, "version"},
		{"shunt", "version"},
		{"shunt-cni"}, // says its name and versions where it finds no CNI_COMMAND
	} {
		if out, err := c.run(t, "", argv...); err != nil || strings.TrimSpace(out) == "" {
			t.Errorf("%q: %v\n%s", argv, err, out)
		}
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for suffix, want := range map[string]string{"": "(nf_tables)", "-nft": "(nf_tables)", "-legacy": "(legacy)"} {
			for _, verb := range []string{"", "-restore", "-save"} {
				if out, err := c.run(t, "", family+suffix+verb, "--version"); err != nil || !strings.Contains(out, want) {
					t.Errorf("%s --version: %v, not of %s: %s", family+suffix+verb, err, want, out)
				}
			}
		}
	}

	pods, err := os.ReadFile("../../../cmd/shunt/testdata/pods/tproxy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, pod := range []string{string(pods), strings.Replace(string(pods), "TPROXY", "REDIRECT", 1)} {
		for family, program := range map[string]string{"4": "iptables", "6": "ip6tables"} {
			rules, err := c.run(t, pod, "shunt", "render", "--pod", "-", "--family", family)
			if err != nil || !strings.Contains(rules, "COMMIT") {
				t.Fatalf("shunt render: %v\n%s", err, rules)
			}
			for _, suffix := range []string{"-nft", "-legacy"} {
				if out, err := c.run(t, rules, program+suffix+"-restore", "--noflush"); err != nil {
					t.Errorf("%s%s-restore refuses a pod's rules: %v\n%s", program, suffix, err, out)
				}
			}
		}
	}
}
