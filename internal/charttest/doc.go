// SPDX-License-Identifier: Apache-2.0

// Package charttest tests the Helm chart in install/chart, and the manifests
// in install/manifests that are rendered from it. Helm's engine is built from
// tools/helm, a module of its own, when the tests start.
//
// With -update the tests write what they would compare with: the manifests,
// and testdata/options, which has for each option what it changes.
package charttest
