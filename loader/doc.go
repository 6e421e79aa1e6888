// SPDX-License-Identifier: Apache-2.0

// Package loader is the only owner of kernel objects: it loads the datapath
// once a node, pins it, attaches it to pods, checks that, and undoes it. It
// knows namespaces, cgroups and maps; nothing of Kubernetes.
//
// What it keeps, where, and in which order things are done is told in
// docs/ARCHITECTURE.md.
package loader
