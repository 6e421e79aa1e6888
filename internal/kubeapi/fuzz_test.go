// SPDX-License-Identifier: Apache-2.0

package kubeapi

import (
	"net/url"
	"testing"
)

// FuzzKubeconfig: a kubeconfig gives a cluster, whose server is a URL, and a user,
// or an error. Files that it names are not read here.
func FuzzKubeconfig(f *testing.F) {
	f.Add([]byte(`{"current-context":"c","contexts":[{"name":"c","context":{"cluster":"k","user":"u"}}],"clusters":[{"name":"k","cluster":{"server":"https://10.0.0.1:443"}}],"users":[{"name":"u","user":{"token":"t"}}]}`))
	f.Add([]byte("current-context: c\ncontexts:\n- name: c\n  context: {cluster: k}\nclusters:\n- name: k\n  cluster: {server: 'https://[::1]/x/', certificate-authority-data: YQ==}\n"))
	f.Add([]byte("a: &a [*a, *a]\n"))
	f.Add([]byte(`{"users":[{"user":{"exec":{}}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var k kubeconfig
		if unmarshal(data, &k) != nil {
			return
		}
		cl, us, err := k.current()
		if err == nil && (cl == nil || us == nil) {
			t.Fatalf("no cluster or no user, and no error")
		}
		if err != nil {
			return
		}
		server, err := serverURL(cl.Server)
		if err != nil {
			return
		}
		if u, err := url.Parse(server); err != nil || u.Host == "" {
			t.Errorf("server %q: %v", server, err)
		}
	})
}
