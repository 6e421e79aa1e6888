// SPDX-License-Identifier: Apache-2.0

package agent

import "testing"

// FuzzParseClaims: a token, of which the agent reads how long it lives.
func FuzzParseClaims(f *testing.F) {
	f.Add("e30.eyJleHAiOjE3MDAwMDAwMDAsImlhdCI6MSwic3ViIjoic3lzdGVtOnNlcnZpY2VhY2NvdW50OmE6YiJ9.c2ln")
	f.Add("a..b")
	f.Add("x.eyJleHAiOjFlMzA4fQ.y")
	f.Fuzz(func(t *testing.T, token string) {
		c := parseClaims(token)
		if namespace, name, ok := c.account(); ok && (namespace == "" || name == "") {
			t.Errorf("%q is the token of %q/%q", token, namespace, name)
		}
		if c != nil && (c.Expires <= 0 || c.issued().IsZero() && c.expires().IsZero()) {
			t.Errorf("%q expires at %v", token, c.Expires)
		}
	})
}
