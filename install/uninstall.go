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
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
)

// Uninstall takes the plugin from the node: its entry first, so that no pod is
// started with what is about to go; where that fails nothing else is touched.
// Then the kubeconfig and its token, the agent's name, socket and claim, and the
// binaries. What was done for pods stays, and its records too: pods that run keep
// their redirection.
//
// The plugin's two binaries stay as long as the runtime may call it for a pod that
// started while the entry was there. Some runtimes (CRI-O) remember each pod's
// chain, and can't remove a pod whose chain names a plugin that is missing. To call
// Uninstall again later removes them.
//
// Of the options it needs BinDir, ConfDir and RunDir, Chained and ConfFile where a
// file of its own was written, and Kubeconfig.Path where there is one.
func Uninstall(ctx context.Context, opts Options) error {
	opts.defaults()
	if err := opts.checkDirs(); err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	return opts.uninstall(ctx, realTimes)
}

func (o *Options) uninstall(ctx context.Context, times times) error {
	if _, err := os.Lstat(o.RunDir); err == nil {
		release, err := lock(ctx, o.RunDir)
		if err != nil {
			return fmt.Errorf("uninstall: %w", err)
		}
		defer release()
	}
	left, links, err := o.leave(ctx)
	if err != nil {
		return fmt.Errorf("uninstall: take the entry out of the CNI configuration: %w", err)
	}
	errs := []error{sweep(append(o.dirs(), links...)...)}
	drop := func(path string) {
		removed, err := remove(path)
		errs = append(errs, err)
		if removed {
			o.Log.Info("removed", "file", path)
		}
	}
	if o.Kubeconfig.Path != "" {
		drop(o.Kubeconfig.Path)
	}
	drop(TokenPath(o.RunDir))
	drop(filepath.Join(o.RunDir, agentFile))
	drop(filepath.Join(o.RunDir, socketFile))
	drop(filepath.Join(o.RunDir, claimFile))
	if left && o.CacheDir != "" {
		// An ADD that was under way by the old chain is remembered at its end.
		select {
		case <-ctx.Done():
			return errors.Join(append(errs, context.Cause(ctx))...)
		case <-time.After(times.leave):
		}
	}
	why := o.needed()
	for _, name := range slices.Backward(binaries) {
		path := filepath.Join(o.BinDir, name)
		if why == "" {
			drop(path)
		} else if _, err := os.Lstat(path); err == nil {
			o.Log.Warn("the plugin's binary stays, or pods that started with it could not be removed: uninstall again, or remove the file, when none of them is left",
				"file", path, "because", why)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	return nil
}

// leave takes the entry out of every file. It says whether there was one, and
// where links lead.
func (o *Options) leave(ctx context.Context) (left bool, links []string, err error) {
	dir := confDir(o.ConfDir)
	for {
		var files []confFile
		if files, links, _, err = dir.read(); err != nil {
			return left, nil, err
		}
		edits := leave(files, "")
		for i := range files {
			f := &files[i]
			switch {
			case f.err != nil && !errors.Is(f.err, fs.ErrNotExist): // what a link does not lead to was never written
				return left, nil, fmt.Errorf("%s may have the entry: %w", dir.path(f.name), f.err)
			case !onlyOurs(f):
			case !o.Chained && f.name == o.ConfFile:
				edits = append(edits, edit{name: f.name, was: f.data})
			default:
				o.Log.Warn("a CNI configuration has shunt-cni as its only plugin, and stays: remove it if nobody needs it", "file", dir.path(f.name))
			}
		}
		changed := false
		for _, e := range edits {
			err := dir.apply(e)
			if errors.Is(err, errChanged) {
				changed = true
				continue
			}
			if err != nil {
				return left, nil, fmt.Errorf("%s: %w", dir.path(e.name), err)
			}
			left = true
			o.Log.Info("took the entry out of the CNI configuration", "file", dir.path(e.name))
		}
		// Once more, as long as others write at the same time.
		if !changed {
			return left, links, nil
		}
		if ctx.Err() != nil {
			return left, nil, context.Cause(ctx)
		}
	}
}

// onlyOurs says whether a file is a configuration without plugins of others.
func onlyOurs(f *confFile) bool {
	if f.skip != nil || f.err != nil || wrappedFrom(f.data) != "" {
		return false
	}
	if filepath.Ext(f.name) != ".conflist" {
		c, err := libcni.NetworkPluginConfFromBytes(f.data)
		return err == nil && c.Network.Type == pluginType
	}
	l, err := parseList(f.data)
	if err != nil {
		return false
	}
	ours, others := l.count()
	return ours > 0 && others == 0
}

// needed says why the plugin may still be called, or is "".
func (o *Options) needed() string {
	for _, dir := range []string{"attachments", "iptables"} {
		entries, err := os.ReadDir(filepath.Join(o.RunDir, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Sprintf("the records of pods can't be read: %v", err)
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".json") {
				return "pods are redirected, such as that of " + filepath.Join(o.RunDir, dir, e.Name())
			}
		}
	}
	if o.CacheDir == "" {
		return "which pods started with it can't be told without the runtime's cache"
	}
	dir := filepath.Join(o.CacheDir, "results")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Sprintf("the runtime's cache can't be read: %v", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		data, err := readConf(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Sprintf("the runtime's cache can't be read: %v", err)
		}
		if remembers(data) {
			return "the runtime remembers pods that started with it, such as that of " + path
		}
	}
	return ""
}

// remembers says whether a cached result is of a chain with the plugin. What
// can't be read counts as one.
func remembers(data []byte) bool {
	var cached struct {
		Kind   string `json:"kind"`
		Config []byte `json:"config"`
	}
	if err := json.Unmarshal(data, &cached); err != nil {
		// As libcni wrote them before it kept the chain too: a bare result.
		return bytes.Contains(data, []byte(pluginType)) || !json.Valid(data)
	}
	if len(cached.Config) == 0 {
		return cached.Kind != ""
	}
	l, err := libcni.NetworkConfFromBytes(cached.Config)
	if err == nil {
		for _, c := range l.Plugins {
			if c.Network.Type == pluginType {
				return true
			}
		}
		if len(l.Plugins) > 0 {
			return false
		}
	}
	c, err := libcni.NetworkPluginConfFromBytes(cached.Config)
	return err != nil || c.Network.Type == pluginType
}
