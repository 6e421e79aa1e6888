// SPDX-License-Identifier: Apache-2.0

// Package install puts the plugin on a node and keeps it there: its binaries,
// its kubeconfig, and its entry in the node's chain of CNI plugins. It watches
// all of them, and puts right what others change.
//
// What is to be done of the CNI configuration is decided by pure functions:
// see plan and list. Files of others are never written but by the entry that
// is spliced in or out; every other byte of them stays.
package install
