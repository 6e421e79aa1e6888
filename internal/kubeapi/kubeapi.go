// SPDX-License-Identifier: Apache-2.0

// Package kubeapi is a Kubernetes API client that does one thing: it gets one
// pod, once. The plugin is started for every pod, so what it costs to start
// counts; a client-go clientset costs more than all the rest of an ADD.
package kubeapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// maxBody bounds what is read of an answer, in bytes. etcd takes no object
// above 1.5 MiB.
const maxBody = 8 << 20

// A StatusError is an answer other than 200.
type StatusError struct {
	URL  string
	Code int // HTTP status
	// Message is that of the Kubernetes Status object in the body, if it is one.
	Message string
	// RetryAfter is how long the server asks to wait; 0 when it does not say.
	RetryAfter time.Duration
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("get %s: %d %s", e.URL, e.Code, http.StatusText(e.Code))
	if e.Message != "" {
		s += ": " + e.Message
	}
	return s
}

// A Client gets pods from the API server that a kubeconfig names.
//
// The kubeconfig and the files it names are read anew at each call, for the
// node agent replaces them whenever its token is rotated. Connections are kept
// while what they say stays the same.
//
// A Client must not be used by two goroutines at once.
type Client struct {
	kubeconfig string
	userAgent  string

	creds *credentials // that http was made of
	http  *http.Client
}

// NewClient returns a client. It reads nothing and connects nowhere yet.
func NewClient(kubeconfig, userAgent string) *Client {
	return &Client{kubeconfig: kubeconfig, userAgent: userAgent}
}

// Kubeconfig returns the path of the client's kubeconfig.
func (c *Client) Kubeconfig() string { return c.kubeconfig }

// CheckConfig reads the kubeconfig and the files that it names, and fails with
// a *ConfigError where a request could not even be made.
func CheckConfig(kubeconfig string) error {
	return NewClient(kubeconfig, "").reload()
}

// Pod gets the pod once and returns it in JSON, unread. It takes as long as
// ctx allows. It fails with a *ConfigError where the kubeconfig can't be used,
// with a *StatusError where the server answers anything but 200, and otherwise
// with what the network came to.
func (c *Client) Pod(ctx context.Context, namespace, name string) ([]byte, error) {
	if err := c.reload(); err != nil {
		return nil, err
	}
	at := c.creds.server + "/api/v1/namespaces/" + url.PathEscape(namespace) + "/pods/" + url.PathEscape(name)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", at, err)
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", c.userAgent)
	if c.creds.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.creds.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, lower(err)
	}
	defer resp.Body.Close()
	var body []byte
	if resp.ContentLength <= maxBody { // or is unknown, -1
		body, err = readBounded(resp.Body, maxBody, "the answer")
	} else {
		err = fmt.Errorf("the answer is larger than %d bytes", maxBody)
	}
	if resp.StatusCode != http.StatusOK { // with whatever could be read of its body
		return nil, statusError(at, resp, body)
	}
	if err != nil {
		return nil, fmt.Errorf("get %s: read: %w", at, err)
	}
	return body, nil
}

// reload reads the kubeconfig and makes a new HTTP client if it differs from
// what the present one was made of.
func (c *Client) reload() error {
	creds, err := readCredentials(c.kubeconfig)
	if err != nil {
		return err
	}
	if c.creds != nil && creds.equal(c.creds) {
		return nil
	}
	t, err := creds.tlsConfig()
	if err != nil {
		return &ConfigError{Path: c.kubeconfig, Err: err}
	}
	if c.http != nil {
		c.http.CloseIdleConnections()
	}
	c.creds = creds
	c.http = &http.Client{
		Transport: &http.Transport{
			// No proxy from the environment: the plugin has the runtime's,
			// which is meant for pulling images.
			Proxy:           nil,
			DialContext:     (&net.Dialer{}).DialContext,
			TLSClientConfig: t,
		},
		// A redirect would carry the token to who knows where.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return nil
}

// lower turns net/http's `Get "URL": cause` into this project's form.
func lower(err error) error {
	var e *url.Error
	if errors.As(err, &e) {
		return fmt.Errorf("%s %s: %w", strings.ToLower(e.Op), e.URL, e.Err)
	}
	return err
}

func statusError(at string, resp *http.Response, body []byte) *StatusError {
	e := &StatusError{URL: at, Code: resp.StatusCode}
	var status struct {
		Kind    string `json:"kind"`
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &status) == nil && status.Kind == "Status" {
		const most = 1024
		e.Message = strings.ToValidUTF8(status.Message[:min(len(status.Message), most)], "")
	}
	// The form with a date is not what API servers send.
	if s, err := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 16); err == nil {
		e.RetryAfter = time.Duration(s) * time.Second
	}
	return e
}

// readBounded reads all of r, and fails when that is more than most bytes.
func readBounded(r io.Reader, most int64, what string) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, most+1))
	if err != nil {
		return data, err
	}
	if int64(len(data)) > most {
		return nil, fmt.Errorf("%s is larger than %d bytes", what, most)
	}
	return data, nil
}
