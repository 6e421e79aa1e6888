// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"

	"shunt.dev/shunt/internal/kubeapi"
)

// KubeconfigOptions say how the plugin gets to the API server. Without a Path no
// kubeconfig is written.
type KubeconfigOptions struct {
	// Path is where the kubeconfig is written.
	Path string
	// Server is the API server's URL, as the node can reach it.
	Server string
	// CAFile is that of the agent's service account, TokenFile one with a token
	// of it. Their content goes into the kubeconfig, anew whenever it changes.
	CAFile, TokenFile string
	// TLSServerName is the name in the server's certificate, where it is not the
	// URL's.
	TLSServerName string
	// Insecure leaves the server's certificate unchecked, and CAFile unread.
	Insecure bool
}

func (k KubeconfigOptions) validate() error {
	if k.Path == "" {
		return nil
	}
	if !filepath.IsAbs(k.Path) {
		return fmt.Errorf("kubeconfig: path: %q is not an absolute path", k.Path)
	}
	if u, err := url.Parse(k.Server); err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return fmt.Errorf("kubeconfig: server: %q is not a URL such as https://host:6443", k.Server)
	}
	if k.TokenFile == "" {
		return errors.New("kubeconfig: token file: none is given: expected the path of the service account's token")
	}
	return nil
}

// render makes the kubeconfig. It is JSON, which the plugin reads in less time
// than YAML.
func (k KubeconfigOptions) render() ([]byte, error) {
	token, err := readConf(k.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	if token = bytes.TrimSpace(token); len(token) == 0 {
		return nil, fmt.Errorf("token: %s is empty", k.TokenFile)
	}
	cluster := map[string]any{"server": k.Server}
	if k.TLSServerName != "" {
		cluster["tls-server-name"] = k.TLSServerName
	}
	if k.Insecure {
		cluster["insecure-skip-tls-verify"] = true
	} else if k.CAFile != "" {
		ca, err := readConf(k.CAFile)
		if err != nil {
			return nil, fmt.Errorf("certificate authority: %w", err)
		}
		if len(ca) == 0 {
			return nil, fmt.Errorf("certificate authority: %s is empty", k.CAFile)
		}
		cluster["certificate-authority-data"] = ca // base64, as kubeconfigs have it
	}
	const name = "shunt"
	data, err := json.MarshalIndent(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": name,
		"clusters": []any{map[string]any{"name": name, "cluster": cluster}},
		"users":    []any{map[string]any{"name": name, "user": map[string]any{"token": string(token)}}},
		"contexts": []any{map[string]any{"name": name, "context": map[string]any{"cluster": name, "user": name}}},
	}, "", "  ")
	return append(data, '\n'), err
}

// write has the kubeconfig be what the service account's files make it. At every
// moment there is a whole one, and never one that the plugin can't use.
func (k KubeconfigOptions) write() (changed bool, err error) {
	if k.Path == "" {
		return false, nil
	}
	data, err := k.render()
	if err != nil {
		return false, err
	}
	if is, err := readConf(k.Path); err == nil && bytes.Equal(is, data) {
		return put(k.Path, data, 0o600) // its mode may be another
	}
	temp, err := writeTemp(filepath.Dir(k.Path), bytes.NewReader(data), own(0o600))
	if err != nil {
		return false, err
	}
	if err := kubeapi.CheckConfig(temp); err != nil {
		_ = os.Remove(temp)
		var config *kubeapi.ConfigError
		if errors.As(err, &config) {
			err = config.Err
		}
		return false, fmt.Errorf("made of %s and %s it would be of no use: %w", k.TokenFile, k.CAFile, err)
	}
	return true, replaceBy(temp, k.Path)
}
