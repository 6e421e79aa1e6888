// SPDX-License-Identifier: Apache-2.0

// Package redirect says what is redirected: from a pod's facts to a Policy
// (parse, validate), and from a Policy and a flow to a verdict
// (Policy.Decide, the reference evaluator that every backend is tested
// against). It is pure: no root, no netns, no kernel.
package redirect
