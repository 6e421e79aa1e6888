// SPDX-License-Identifier: Apache-2.0

// Package repair finds the pods of a node that ought to be redirected and are
// not, and does something about it.
//
// Two kinds are found. A pod that was started before the plugin was there: its
// validation init container ends with exit code 126, again and again (Filter).
// And a pod that runs, but whose redirection was lost, or differs from what was
// programmed: a look at each of them, from time to time, tells (sweep).
//
// Each node has its own controller, which looks after its own pods: there is no
// leader. It keeps nothing: what has been done is to be seen in the cluster, or
// in the kernel.
package repair
