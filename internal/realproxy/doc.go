// SPDX-License-Identifier: Apache-2.0

// Package realproxy has tests only: of proxies that nobody here wrote, behind
// the redirection that the plugin makes.
package realproxy
