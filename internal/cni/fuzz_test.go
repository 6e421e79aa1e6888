// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"strings"
	"testing"

	"shunt.dev/shunt/redirect"
)

// FuzzArgs: CNI_ARGS, and the file by which the agent says who it is.
func FuzzArgs(f *testing.F) {
	f.Add("IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=a;K8S_POD_UID=1")
	f.Add("K8S_POD_NAME;;=;K8S_POD_NAME=a=b;kube-system/shunt-node\n")
	f.Fuzz(func(t *testing.T, text string) {
		p := parseArgs(text)
		for _, s := range []string{p.Namespace, p.Name, p.UID} {
			if strings.Contains(s, ";") || !strings.Contains(text, s) {
				t.Errorf("%q gives %+v", text, p)
			}
		}
		if a, ok := redirect.ParseAgentRef(text); ok && strings.TrimSpace(text) != a.String() {
			t.Errorf("%q gives %v", text, a)
		}
	})
}
