// SPDX-License-Identifier: Apache-2.0

// Package e2e tests Shunt on a real node: kubelet, containerd and runc start
// the pods, the chart installs the agent, and the agent puts the plugin into
// the chain of the bridge plugin. `make e2e` runs it; docs/TESTING.md tells
// how it works.
//
// The tests have the build tag e2e and run in the node's namespaces.
package e2e
