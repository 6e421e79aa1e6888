// SPDX-License-Identifier: Apache-2.0

// Command image makes the node agent's container image, without a registry, a
// container engine or root: an OCI image layout in a tar archive, as
// `ctr images import`, `podman load` and `docker load` take it. It has the
// commands of this module and, of the system that it is made on, iptables with
// all that it is linked to. The same input gives the same bytes.
package main

import (
	"compress/gzip"
	"flag"
	"fmt"
	"os"
	"runtime"
)

func main() {
	o := options{level: gzip.BestCompression, arch: runtime.GOARCH}
	flag.StringVar(&o.out, "o", "shunt-node.tar", "the archive to write")
	flag.StringVar(&o.bin, "bin", "bin", "the directory with the commands, linked statically")
	flag.StringVar(&o.name, "name", "localhost/shunt/shunt-node:dev", "the image's name and tag")
	flag.StringVar(&o.root, "root", "/", "the root of the system that has iptables")
	flag.Parse()
	if flag.NArg() != 0 {
		fmt.Fprintf(os.Stderr, "image: %q: expected no arguments\n", flag.Args())
		os.Exit(2)
	}
	digest, size, err := build(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
	fmt.Fprintf(os.Stderr, "%s: %s, %.1f MiB, %s\n", o.out, o.name, float64(size)/(1<<20), digest)
}
