// SPDX-License-Identifier: Apache-2.0

package kubeapi

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"sigs.k8s.io/yaml"
)

// A ConfigError says that a kubeconfig, or a file that it names, can't be
// used. To try again without changing it is of no use.
type ConfigError struct {
	Path string // of the kubeconfig
	Err  error
}

func (e *ConfigError) Error() string {
	return fmt.Sprintf("read kubeconfig %s: %v", e.Path, e.Err)
}

func (e *ConfigError) Unwrap() error { return e.Err }

// kubeconfig is what is read of the format (the v1 Config of
// k8s.io/client-go/tools/clientcmd). Members that Shunt can't
// honour are read too, so that they can be refused.
type kubeconfig struct {
	CurrentContext string `json:"current-context"`
	Clusters       []struct {
		Name    string  `json:"name"`
		Cluster cluster `json:"cluster"`
	} `json:"clusters"`
	Contexts []struct {
		Name    string `json:"name"`
		Context struct {
			Cluster string `json:"cluster"`
			User    string `json:"user"`
		} `json:"context"`
	} `json:"contexts"`
	Users []struct {
		Name string `json:"name"`
		User user   `json:"user"`
	} `json:"users"`
}

type cluster struct {
	Server                   string `json:"server"`
	TLSServerName            string `json:"tls-server-name"`
	InsecureSkipTLSVerify    bool   `json:"insecure-skip-tls-verify"`
	CertificateAuthority     string `json:"certificate-authority"`
	CertificateAuthorityData []byte `json:"certificate-authority-data"`
	ProxyURL                 string `json:"proxy-url"`
}

type user struct {
	ClientCertificate     string          `json:"client-certificate"`
	ClientCertificateData []byte          `json:"client-certificate-data"`
	ClientKey             string          `json:"client-key"`
	ClientKeyData         []byte          `json:"client-key-data"`
	Token                 string          `json:"token"`
	TokenFile             string          `json:"tokenFile"`
	Impersonate           string          `json:"as"`
	Username              string          `json:"username"`
	Exec                  json.RawMessage `json:"exec"`
	AuthProvider          json.RawMessage `json:"auth-provider"`
}

// credentials is what a kubeconfig comes to, with every file read. Two that
// are equal make equal clients.
type credentials struct {
	server     string // URL, without a trailing slash
	serverName string
	insecure   bool
	ca         []byte // PEM; empty: the system's roots
	cert, key  []byte // PEM; empty: no client certificate
	token      string
}

// maxFile bounds what is read of a kubeconfig and of the files it names, in
// bytes.
const maxFile = 1 << 20

// readCredentials reads the kubeconfig at path and the files that it names. Its
// errors are *ConfigError.
func readCredentials(path string) (*credentials, error) {
	c, err := loadCredentials(path)
	if err != nil {
		return nil, &ConfigError{Path: path, Err: err}
	}
	return c, nil
}

func loadCredentials(path string) (*credentials, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	var k kubeconfig
	if err := unmarshal(data, &k); err != nil {
		return nil, err
	}
	cl, us, err := k.current()
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	c := &credentials{serverName: cl.TLSServerName, insecure: cl.InsecureSkipTLSVerify}
	if c.server, err = serverURL(cl.Server); err != nil {
		return nil, err
	}
	if c.ca, err = dataOrFile(dir, "certificate-authority", cl.CertificateAuthorityData, cl.CertificateAuthority); err != nil {
		return nil, err
	}
	if c.insecure && c.ca != nil {
		return nil, errors.New("insecure-skip-tls-verify and a certificate authority exclude one another: remove one of them")
	}
	if c.cert, err = dataOrFile(dir, "client-certificate", us.ClientCertificateData, us.ClientCertificate); err != nil {
		return nil, err
	}
	if c.key, err = dataOrFile(dir, "client-key", us.ClientKeyData, us.ClientKey); err != nil {
		return nil, err
	}
	if c.token, err = us.bearer(dir); err != nil {
		return nil, err
	}
	return c, nil
}

// unmarshal reads JSON as JSON, for the YAML library takes its time.
func unmarshal(data []byte, k *kubeconfig) error {
	if trimmed := bytes.TrimLeft(data, " \t\r\n"); len(trimmed) > 0 && trimmed[0] == '{' && json.Valid(data) {
		if err := json.Unmarshal(data, k); err != nil {
			return fmt.Errorf("decode JSON: %w", err)
		}
		return nil
	}
	if err := yaml.Unmarshal(data, k); err != nil {
		return fmt.Errorf("decode YAML: %w", err)
	}
	return nil
}

// current returns the cluster and the user of the current context.
func (k *kubeconfig) current() (*cluster, *user, error) {
	if k.CurrentContext == "" {
		return nil, nil, errors.New("current-context is missing: say which context is to be used")
	}
	for i := range k.Contexts {
		if k.Contexts[i].Name != k.CurrentContext {
			continue
		}
		ctx := &k.Contexts[i].Context
		cl := k.cluster(ctx.Cluster)
		if cl == nil {
			return nil, nil, fmt.Errorf("context %q names cluster %q, which is not among clusters", k.CurrentContext, ctx.Cluster)
		}
		us := &user{}
		if ctx.User != "" {
			if us = k.user(ctx.User); us == nil {
				return nil, nil, fmt.Errorf("context %q names user %q, which is not among users", k.CurrentContext, ctx.User)
			}
		}
		return cl, us, refuse(cl, us)
	}
	return nil, nil, fmt.Errorf("current-context %q is not among contexts", k.CurrentContext)
}

func (k *kubeconfig) cluster(name string) *cluster {
	for i := range k.Clusters {
		if k.Clusters[i].Name == name {
			return &k.Clusters[i].Cluster
		}
	}
	return nil
}

func (k *kubeconfig) user(name string) *user {
	for i := range k.Users {
		if k.Users[i].Name == name {
			return &k.Users[i].User
		}
	}
	return nil
}

// refuse fails where the kubeconfig asks for what this client does not do.
func refuse(cl *cluster, us *user) error {
	const remedy = "use token, tokenFile or a client certificate"
	given := func(raw json.RawMessage) bool { return len(raw) > 0 && string(raw) != "null" }
	switch {
	case given(us.Exec):
		return errors.New("the user's exec plugin is not supported: " + remedy)
	case given(us.AuthProvider):
		return errors.New("the user's auth-provider is not supported: " + remedy)
	case us.Username != "":
		return errors.New("the user's username and password are not supported: " + remedy)
	case us.Impersonate != "":
		return errors.New("impersonation (as) is not supported: " + remedy)
	case cl.ProxyURL != "":
		return errors.New("the cluster's proxy-url is not supported: give a server that is reached directly")
	}
	return nil
}

// bearer returns the user's token, or "". A token file wins over a token.
func (u *user) bearer(dir string) (string, error) {
	token := u.Token
	if u.TokenFile != "" {
		data, err := readFile(within(dir, u.TokenFile))
		if err != nil {
			return "", fmt.Errorf("tokenFile: %w", err)
		}
		if token = strings.TrimSpace(string(data)); token == "" {
			return "", fmt.Errorf("tokenFile: %s is empty", u.TokenFile)
		}
	}
	for _, b := range []byte(token) {
		if b <= ' ' || b > '~' {
			return "", errors.New("token: it has characters that a bearer token cannot have")
		}
	}
	return token, nil
}

func serverURL(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return "", fmt.Errorf("server: %q is not a URL such as https://host:6443", s)
	}
	return strings.TrimRight(s, "/"), nil
}

// dataOrFile returns the PEM that key gives in place, else that of the file.
func dataOrFile(dir, key string, data []byte, path string) ([]byte, error) {
	if len(data) > 0 {
		return data, nil
	}
	if path == "" {
		return nil, nil
	}
	data, err := readFile(within(dir, path))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	if len(data) == 0 {
		return nil, fmt.Errorf("%s: %s is empty", key, path)
	}
	return data, nil
}

// within resolves a path as kubeconfigs do: relative to their own directory.
func within(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

func readFile(path string) ([]byte, error) {
	// O_NONBLOCK: to open a FIFO would wait for somebody to write.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	return readBounded(f, maxFile, path)
}

// tlsConfig returns the credentials as crypto/tls wants them.
func (c *credentials) tlsConfig() (*tls.Config, error) {
	t := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		ServerName:         c.serverName,
		InsecureSkipVerify: c.insecure, //#nosec G402 -- the kubeconfig asks for it
		NextProtos:         []string{"http/1.1"},
	}
	if c.ca != nil {
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(c.ca) {
			return nil, errors.New("certificate-authority: no PEM certificate in it")
		}
	}
	if c.cert != nil || c.key != nil {
		pair, err := tls.X509KeyPair(c.cert, c.key)
		if err != nil {
			return nil, fmt.Errorf("client-certificate and client-key: %w", err)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	return t, nil
}
