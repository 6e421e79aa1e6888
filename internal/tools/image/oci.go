// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

type options struct {
	out  string // the archive
	bin  string // directory of the commands
	name string // NAME:TAG
	root string // of the system that has iptables
	arch string // as Go names it

	level int // of gzip
}

// The types of the OCI image specification, as much of them as is written.
type (
	descriptor struct {
		MediaType   string            `json:"mediaType"`
		Digest      string            `json:"digest"`
		Size        int64             `json:"size"`
		Platform    *platform         `json:"platform,omitempty"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	platform struct {
		Architecture string `json:"architecture"`
		OS           string `json:"os"`
	}
	manifest struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        descriptor   `json:"config"`
		Layers        []descriptor `json:"layers"`
	}
	index struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Manifests     []descriptor `json:"manifests"`
	}
	imageConfig struct {
		Created time.Time `json:"created"`
		platform
		Config  execution `json:"config"`
		RootFS  rootFS    `json:"rootfs"`
		History []history `json:"history"`
	}
	execution struct {
		Env        []string          `json:"Env"`
		Entrypoint []string          `json:"Entrypoint"`
		WorkingDir string            `json:"WorkingDir"`
		Labels     map[string]string `json:"Labels"`
	}
	rootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
	history struct {
		Created   time.Time `json:"created"`
		CreatedBy string    `json:"created_by"`
	}
)

const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// epoch is the time of everything: the same input gives the same bytes.
var epoch = time.Unix(0, 0).UTC()

// build writes the archive, and gives the image's digest and the archive's
// size in bytes.
func build(o options) (digest string, size int64, err error) {
	repository, tag, ok := strings.Cut(o.name[strings.LastIndex(o.name, "/")+1:], ":")
	if !ok || tag == "" || repository == "" {
		return "", 0, fmt.Errorf("name %q is not NAME:TAG", o.name)
	}
	base, err := system(o.root)
	if err != nil {
		return "", 0, err
	}
	product, err := own(o.bin)
	if err != nil {
		return "", 0, err
	}

	archive := tree{}
	blob := func(mediaType string, data []byte) descriptor {
		d := descriptor{MediaType: mediaType, Digest: digestOf(data), Size: int64(len(data))}
		archive.put("blobs/"+strings.Replace(d.Digest, ":", "/", 1), file{mode: 0o644, data: data})
		return d
	}
	conf := imageConfig{
		Created: epoch, platform: platform{Architecture: o.arch, OS: "linux"},
		Config: execution{
			Env: []string{"PATH=" + searchPath}, Entrypoint: []string{entrypoint}, WorkingDir: "/",
			Labels: map[string]string{
				"org.opencontainers.image.title":    "shunt-node",
				"org.opencontainers.image.version":  tag,
				"org.opencontainers.image.licenses": "Apache-2.0 AND GPL-2.0-or-later AND LGPL-2.1-or-later",
			},
		},
		RootFS: rootFS{Type: "layers"},
	}
	m := manifest{SchemaVersion: 2, MediaType: typeManifest}
	// What changes seldom comes first.
	for _, layer := range []struct {
		what  string
		files tree
	}{{"iptables", base}, {"shunt", product}} {
		var plain, packed bytes.Buffer
		if err := writeTar(&plain, layer.files); err != nil {
			return "", 0, err
		}
		zip, err := gzip.NewWriterLevel(&packed, o.level)
		if err != nil {
			return "", 0, err
		}
		if _, err := zip.Write(plain.Bytes()); err != nil {
			return "", 0, err
		}
		if err := zip.Close(); err != nil {
			return "", 0, err
		}
		conf.RootFS.DiffIDs = append(conf.RootFS.DiffIDs, digestOf(plain.Bytes()))
		conf.History = append(conf.History, history{Created: epoch, CreatedBy: layer.what})
		m.Layers = append(m.Layers, blob(typeLayer, packed.Bytes()))
	}
	m.Config = blob(typeConfig, mustJSON(conf))
	top := blob(typeManifest, mustJSON(m))
	top.Platform = &conf.platform
	top.Annotations = map[string]string{
		"org.opencontainers.image.ref.name": tag,
		"io.containerd.image.name":          o.name, // what `ctr images import` names it
	}
	archive.put("index.json", file{mode: 0o644, data: mustJSON(index{SchemaVersion: 2, MediaType: typeIndex, Manifests: []descriptor{top}})})
	archive.put("oci-layout", file{mode: 0o644, data: []byte(`{"imageLayoutVersion":"1.0.0"}`)})
	size, err = writeArchive(o.out, archive)
	return top.Digest, size, err
}

// writeArchive writes to a file beside it first: what is there is whole.
func writeArchive(name string, archive tree) (size int64, err error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-")
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	defer f.Close()
	if err := writeTar(f, archive); err != nil {
		return 0, err
	}
	if size, err = f.Seek(0, io.SeekCurrent); err != nil {
		return 0, err
	}
	if err := f.Chmod(0o644); err != nil {
		return 0, err
	}
	if err := f.Close(); err != nil {
		return 0, err
	}
	return size, os.Rename(f.Name(), name)
}

func writeTar(w io.Writer, files tree) error {
	tw := tar.NewWriter(w)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		f := files[name]
		h := &tar.Header{Format: tar.FormatUSTAR, Name: name, Mode: int64(f.mode.Perm()), ModTime: epoch, Typeflag: tar.TypeReg, Size: int64(len(f.data))}
		switch {
		case f.mode.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, name+"/"
			if f.mode&fs.ModeSticky != 0 {
				h.Mode |= 0o1000
			}
		case f.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, err := tw.Write(f.data); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return tw.Close()
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func mustJSON(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // of types of this file
	}
	return data
}
