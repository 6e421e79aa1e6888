// SPDX-License-Identifier: Apache-2.0

package kubeapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

func write(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// config writes a kubeconfig in YAML of a cluster's and a user's members.
func config(t *testing.T, dir, cluster, user string) string {
	t.Helper()
	indent := func(s string) string { return strings.ReplaceAll("\n"+s, "\n", "\n    ") }
	return write(t, filepath.Join(dir, "kubeconfig"), `apiVersion: v1
kind: Config
preferences: {}
clusters:
- name: other
  cluster: {server: "https://other.invalid"}
- name: c
  cluster:`+indent(cluster)+`
users:
- name: u
  user:`+indent(user)+`
contexts:
- name: x
  context: {cluster: c, user: u, namespace: default}
current-context: x
`)
}

func TestGetPod(t *testing.T) {
	s := testbed.NewAPIServer(t)
	s.SetPod(t, "ns", "a.b-1", map[string]string{"kind": "Pod"})
	// An environment's proxy would be asked to reach the server.
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	c := NewClient(s.WriteKubeconfig(t, t.TempDir()), "agent/1")
	for range 2 {
		body, err := c.Pod(t.Context(), "ns", "a.b-1")
		if err != nil || string(body) != `{"kind":"Pod"}` {
			t.Fatalf("got %s, %v", body, err)
		}
	}
	for _, r := range s.Requests() {
		if r.Method != "GET" || r.Path != "/api/v1/namespaces/ns/pods/a.b-1" {
			t.Errorf("request %s %s", r.Method, r.Path)
		}
		if got := r.Header.Get("Accept"); got != "application/json" {
			t.Errorf("Accept: %s", got)
		}
		if got := r.Header.Get("User-Agent"); got != "agent/1" {
			t.Errorf("User-Agent: %s", got)
		}
	}
	// A name can't become another path.
	if _, err := c.Pod(t.Context(), "ns", "../secrets/x?y"); err == nil {
		t.Error("a pod of a malformed name")
	}
	last := s.Requests()[len(s.Requests())-1]
	if want := "/api/v1/namespaces/ns/pods/..%2Fsecrets%2Fx%3Fy"; last.Path != want {
		t.Errorf("path %s, want %s", last.Path, want)
	}
}

func TestStatusErrors(t *testing.T) {
	s := testbed.NewAPIServer(t)
	c := NewClient(s.WriteKubeconfig(t, t.TempDir()), "")
	at := s.URL() + "/api/v1/namespaces/ns/pods/p"
	for _, tc := range []struct {
		fault testbed.APIFault
		want  StatusError
		text  string
	}{
		{testbed.APIFault{Status: 500, Message: "etcd is down"}, StatusError{Code: 500, Message: "etcd is down"}, "get " + at + ": 500 Internal Server Error: etcd is down"},
		{testbed.APIFault{Status: 429, Message: "slow", RetryAfter: 7}, StatusError{Code: 429, Message: "slow", RetryAfter: 7 * time.Second}, "get " + at + ": 429 Too Many Requests: slow"},
		{testbed.APIFault{Status: 502, Body: []byte("<html>")}, StatusError{Code: 502}, "get " + at + ": 502 Bad Gateway"},
		{testbed.APIFault{Status: 302}, StatusError{Code: 302}, "get " + at + ": 302 Found"},
		{testbed.APIFault{}, StatusError{Code: 404, Message: `pods "p" not found`}, "get " + at + `: 404 Not Found: pods "p" not found`},
	} {
		s.Fail(tc.fault)
		_, err := c.Pod(t.Context(), "ns", "p")
		var got *StatusError
		if !errors.As(err, &got) {
			t.Errorf("%+v: got %v", tc.fault, err)
			continue
		}
		tc.want.URL = at
		if *got != tc.want || err.Error() != tc.text {
			t.Errorf("got %+v (%s)\nwant %+v (%s)", *got, err, tc.want, tc.text)
		}
	}
}

// TestBodyTooBig: whether the server says so beforehand or just sends on.
func TestBodyTooBig(t *testing.T) {
	const want = "the answer is larger than 8388608 bytes"
	s := testbed.NewAPIServer(t)
	s.Fail(testbed.APIFault{Body: make([]byte, maxBody+1)})
	if _, err := NewClient(s.WriteKubeconfig(t, t.TempDir()), "").Pod(t.Context(), "ns", "p"); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v", err)
	}
	endless := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		chunk := make([]byte, 1<<20)
		for {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}))
	defer endless.Close()
	if _, err := NewClient(config(t, t.TempDir(), "server: "+endless.URL, "{}"), "").Pod(t.Context(), "ns", "p"); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("endless: got %v", err)
	}
}

func TestDeadline(t *testing.T) {
	s := testbed.NewAPIServer(t)
	c := NewClient(s.WriteKubeconfig(t, t.TempDir()), "")
	s.FailAlways(testbed.APIFault{Hang: true})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := c.Pod(ctx, "ns", "p")
	if !errors.Is(err, context.DeadlineExceeded) || !strings.HasPrefix(err.Error(), "get "+s.URL()+"/api/v1/") {
		t.Errorf("got %v", err)
	}
}

// TestReload: a rotated token counts from the next request on.
func TestReload(t *testing.T) {
	s := testbed.NewAPIServer(t)
	s.SetPod(t, "ns", "p", "pod")
	dir := t.TempDir()
	c := NewClient(s.WriteKubeconfig(t, dir), "")
	get := func(wantCode int) {
		t.Helper()
		_, err := c.Pod(t.Context(), "ns", "p")
		var status *StatusError
		if wantCode == 200 && err != nil || wantCode != 200 && (!errors.As(err, &status) || status.Code != wantCode) {
			t.Errorf("got %v, want %d", err, wantCode)
		}
	}
	get(200)
	s.RotateToken()
	get(401)
	s.WriteKubeconfig(t, dir)
	get(200)
}

// TestCredentials holds every way to say who the server and the client are.
func TestCredentials(t *testing.T) {
	ca, cert, key := makeCert(t)
	var seen *http.Request
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = r
		_, _ = w.Write([]byte("{}"))
	}))
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert}
	srv.StartTLS()
	defer srv.Close()
	plain := httptest.NewServer(srv.Config.Handler)
	defer plain.Close()

	dir := t.TempDir()
	write(t, filepath.Join(dir, "ca.crt"), string(ca))
	write(t, filepath.Join(dir, "tls.crt"), string(cert))
	write(t, filepath.Join(dir, "tls.key"), string(key))
	write(t, filepath.Join(dir, "token"), "from-file\n")
	b64 := base64.StdEncoding.EncodeToString
	server := "server: " + srv.URL + "\n"
	for _, tc := range []struct {
		name, cluster, user string
		token               string
		clientCert          bool
		err                 string
	}{
		{name: "ca data", cluster: server + "tls-server-name: api.test\ncertificate-authority-data: " + b64(ca), user: "token: abc", token: "Bearer abc"},
		{name: "ca file, relative", cluster: server + "tls-server-name: api.test\ncertificate-authority: ca.crt", user: "tokenFile: token\ntoken: abc", token: "Bearer from-file"},
		{name: "ca file, absolute", cluster: server + "tls-server-name: api.test\ncertificate-authority: " + filepath.Join(dir, "ca.crt"), user: "{}"},
		{name: "insecure", cluster: server + "insecure-skip-tls-verify: true", user: "token: abc", token: "Bearer abc"},
		{name: "client certificate files", cluster: server + "insecure-skip-tls-verify: true", user: "client-certificate: tls.crt\nclient-key: tls.key", clientCert: true},
		{name: "client certificate data", cluster: server + "insecure-skip-tls-verify: true", user: "client-certificate-data: " + b64(cert) + "\nclient-key-data: " + b64(key), clientCert: true},
		{name: "no TLS", cluster: "server: " + plain.URL + "/", user: "token: abc", token: "Bearer abc"},
		{name: "another name", cluster: server + "tls-server-name: x.test\ncertificate-authority: ca.crt", user: "{}", err: "not x.test"},
		{name: "the system's roots", cluster: server + "tls-server-name: api.test", user: "{}", err: "x509: certificate signed by unknown authority"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := NewClient(config(t, dir, tc.cluster, tc.user), "").Pod(t.Context(), "ns", "p")
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("got %v, want %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := seen.Header.Get("Authorization"); got != tc.token {
				t.Errorf("Authorization %q, want %q", got, tc.token)
			}
			if got := seen.TLS != nil && len(seen.TLS.PeerCertificates) > 0; got != tc.clientCert {
				t.Errorf("client certificate: %v, want %v", got, tc.clientCert)
			}
			if seen.URL.Path != "/api/v1/namespaces/ns/pods/p" {
				t.Errorf("path %s", seen.URL.Path)
			}
		})
	}
}

// TestOldTLS: a server that speaks nothing above TLS 1.1 is not spoken to.
func TestOldTLS(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.NotFoundHandler())
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.TLS = &tls.Config{MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}
	srv.StartTLS()
	defer srv.Close()
	_, err := NewClient(config(t, t.TempDir(), "server: "+srv.URL+"\ninsecure-skip-tls-verify: true", "{}"), "").Pod(t.Context(), "ns", "p")
	if err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("got %v", err)
	}
}

// TestConfigErrors holds what a kubeconfig is refused for.
func TestConfigErrors(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "empty"), " \n")
	write(t, filepath.Join(dir, "two-lines"), "a\nb")
	write(t, filepath.Join(dir, "no.pem"), "no PEM")
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	const server = "server: https://h:1\n"
	for _, tc := range []struct{ cluster, user, want string }{
		{"server: ''", "{}", `server: "" is not a URL such as https://host:6443`},
		{"server: 10.0.0.1:6443", "{}", `server: "10.0.0.1:6443" is not a URL`},
		{"server: ftp://h", "{}", `server: "ftp://h" is not a URL`},
		{server + "proxy-url: http://p", "{}", "proxy-url is not supported"},
		{server + "certificate-authority: none.crt", "{}", "certificate-authority: open " + dir + "/none.crt: no such file"},
		{server + "certificate-authority: no.pem", "{}", "certificate-authority: no PEM certificate in it"},
		{server + "certificate-authority: fifo", "{}", "fifo is not a regular file"},
		{server + "certificate-authority-data: '!'", "{}", "illegal base64"},
		{server + "certificate-authority: no.pem\ninsecure-skip-tls-verify: true", "{}", "exclude one another"},
		{server, "tokenFile: none", "tokenFile: open " + dir + "/none: no such file"},
		{server, "tokenFile: empty", "tokenFile: empty is empty"},
		{server, "tokenFile: two-lines", "token: it has characters that a bearer token cannot have"},
		{server, "client-certificate: no.pem\nclient-key: no.pem", "client-certificate and client-key: tls: failed to find any PEM data"},
		{server, "exec: {command: aws}", "exec plugin is not supported: use token, tokenFile or a client certificate"},
		{server, "auth-provider: {name: gcp}", "auth-provider is not supported"},
		{server, "username: a\npassword: b", "username and password are not supported"},
		{server, "as: admin", "impersonation (as) is not supported"},
		{server, "token: [1]", "decode YAML"},
	} {
		path := config(t, dir, tc.cluster, tc.user)
		checkConfig(t, path, tc.want)
	}
	for in, want := range map[string]string{
		"":                           "current-context is missing",
		"{":                          "decode YAML",
		"a: b: c":                    "decode YAML",
		`{"current-context": 1}`:     "decode JSON",
		`{"current-context": "x"}`:   `current-context "x" is not among contexts`,
		`{current-context: "x"}`:     `current-context "x" is not among contexts`,
		strings.Repeat("#", 1<<20+1): "kubeconfig is larger than 1048576 bytes",
		`{"current-context":"x","contexts":[{"name":"x","context":{"cluster":"c"}}]}`:                                      `context "x" names cluster "c", which is not among clusters`,
		`{"current-context":"x","contexts":[{"name":"x","context":{"cluster":"c","user":"u"}}],"clusters":[{"name":"c"}]}`: `context "x" names user "u", which is not among users`,
	} {
		checkConfig(t, write(t, filepath.Join(dir, "kubeconfig"), in), want)
	}
	err := CheckConfig(filepath.Join(dir, "missing"))
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

func checkConfig(t *testing.T, path, want string) {
	t.Helper()
	err := CheckConfig(path)
	var e *ConfigError
	if !errors.As(err, &e) || !strings.HasPrefix(err.Error(), "read kubeconfig "+path+": ") || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v\nwant … %s", err, want)
	}
}

// TestJSONKubeconfig: the same in JSON, and without a user.
func TestJSONKubeconfig(t *testing.T) {
	data, err := json.Marshal(map[string]any{
		"current-context": "x",
		"contexts":        []any{map[string]any{"name": "x", "context": map[string]any{"cluster": "c"}}},
		"clusters":        []any{map[string]any{"name": "c", "cluster": map[string]any{"server": "https://h:1/prefix/"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := readCredentials(write(t, filepath.Join(t.TempDir(), "k"), string(data)))
	if err != nil {
		t.Fatal(err)
	}
	if c.server != "https://h:1/prefix" || c.token != "" {
		t.Errorf("got %+v", c)
	}
}

// makeCert makes a self-signed certificate for api.test.
func makeCert(t *testing.T) (ca, cert, key []byte) {
	t.Helper()
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "api.test"}, DNSNames: []string{"api.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &priv.PublicKey, priv)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return cert, cert, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
}
