// SPDX-License-Identifier: Apache-2.0

// Package agent is the node agent: the DaemonSet's container. It keeps the
// plugin on the node, answers its question about pods, loads the datapath ahead
// of the first pod, and tells what goes on: log, metrics, health.
//
// Nothing that it does is needed for a pod to keep its redirection, and it
// keeps nothing that is lost when it is killed: its loops look, each in its own
// time, at what is and what should be.
package agent
