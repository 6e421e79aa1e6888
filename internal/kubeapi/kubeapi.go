// SPDX-License-Identifier: Apache-2.0

// Package kubeapi is a Kubernetes API client that does one thing: it gets one
// pod, once. The plugin is started for every pod, so what it costs to start
// counts; a client-go clientset costs more than all the rest of an ADD.
package kubeapi

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
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
// node agent replaces them whenever its token is rotated. Each call has a
// connection of its own, and stays on its goroutine: net/http's client hands a
// request through five, which on a node that starts many pods at once is most
// of the time that it takes.
type Client struct {
	kubeconfig string
	userAgent  string
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
	_, _, err := NewClient(kubeconfig, "").load()
	return err
}

// Pod gets the pod once and returns it in JSON, unread. It takes as long as
// ctx allows. It fails with a *ConfigError where the kubeconfig can't be used,
// with a *StatusError where the server answers anything but 200, and otherwise
// with what the network came to.
func (c *Client) Pod(ctx context.Context, namespace, name string) ([]byte, error) {
	creds, tlsConfig, err := c.load()
	if err != nil {
		return nil, err
	}
	at := creds.server + "/api/v1/namespaces/" + url.PathEscape(namespace) + "/pods/" + url.PathEscape(name)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", at, err)
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", c.userAgent)
	req.Header.Set("Connection", "close")
	if creds.token != "" {
		req.Header.Set("Authorization", "Bearer "+creds.token)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", hostPort(req.URL))
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", at, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) }) // fails once it is closed
	defer stop()
	// A redirect is an answer like any other: to follow it would carry the
	// token to who knows where.
	resp, err := roundTrip(conn, req, tlsConfig) //nolint:bodyclose // to close it is to read all of it; conn is closed
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", at, whyEnded(ctx, err))
	}
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
		return nil, fmt.Errorf("get %s: read: %w", at, whyEnded(ctx, err))
	}
	return body, nil
}

// load reads the kubeconfig and all that it names.
func (c *Client) load() (*credentials, *tls.Config, error) {
	creds, err := readCredentials(c.kubeconfig)
	if err != nil {
		return nil, nil, err
	}
	t, err := creds.tlsConfig()
	if err != nil {
		return nil, nil, &ConfigError{Path: c.kubeconfig, Err: err}
	}
	return creds, t, nil
}

// hostPort says where the server of a URL is. There is no proxy from the
// environment: the plugin has the runtime's, which is meant for pulling images.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"https": "443", "http": "80"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// roundTrip sends a request and reads the head of the answer to it.
func roundTrip(conn net.Conn, req *http.Request, config *tls.Config) (*http.Response, error) {
	if req.URL.Scheme == "https" {
		if config.ServerName == "" {
			config.ServerName = req.URL.Hostname()
		}
		secure := tls.Client(conn, config)
		if err := secure.HandshakeContext(context.Background()); err != nil { // conn has the deadline
			return nil, fmt.Errorf("tls: %w", err)
		}
		conn = secure
	}
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	return http.ReadResponse(bufio.NewReader(conn), req)
}

// whyEnded puts the end of ctx in place of what it did to the connection.
func whyEnded(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
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
