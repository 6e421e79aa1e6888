// SPDX-License-Identifier: Apache-2.0

package podfacts

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"shunt.dev/shunt/redirect"
)

// What is read of an answer, and told of it in an error, at most, in bytes.
const (
	maxHead    = 8 << 10
	maxAnswer  = 8 << 20
	maxMessage = 512
)

// A response is one of HTTP/1.1, as far as the agent's are. net/http reads any
// server's; in a process that is started for each pod, making that ready costs more
// than all that is asked and answered.
type response struct {
	code       int
	reason     string // the server's phrase for it
	retryAfter string
	body       []byte
}

// The codes that mean something of their own here.
const (
	httpOK           = 200
	httpBadRequest   = 400
	httpUnauthorized = 401
	httpForbidden    = 403
)

// readPod reads what the agent says. Errors have 1 KiB at most, in valid UTF-8,
// whatever it says.
func readPod(r io.Reader) (*redirect.Pod, error) {
	a, err := readAnswer(r)
	if err != nil {
		return nil, hung(fmt.Errorf("read the answer: %w", err))
	}
	if a.code != httpOK {
		return nil, a.refusal()
	}
	pod, err := redirect.ParsePod(a.body)
	if err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	return pod, nil
}

// readAnswer reads one answer, and of the connection no more than that needs. An
// answer that doesn't say how long its body is, or is cut short, is an error: the
// half of a pod could be taken for one without a proxy.
func readAnswer(r io.Reader) (*response, error) {
	buf := make([]byte, maxHead)
	var n, end int
	for {
		m, err := r.Read(buf[n:])
		n += m
		if end = bytes.Index(buf[:n], []byte("\r\n\r\n")); end >= 0 {
			break
		}
		if n == len(buf) {
			return nil, fmt.Errorf("its head is larger than %d bytes", maxHead)
		}
		if errors.Is(err, io.EOF) {
			return nil, io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
	}
	a := new(response)
	length, err := a.readHead(string(buf[:end]))
	if err != nil {
		return nil, err
	}
	a.body = make([]byte, length)
	got := copy(a.body, buf[end+4:n])
	if _, err := io.ReadFull(r, a.body[got:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return a, nil
}

// readHead reads the status line and the headers, and returns how long the body is.
func (a *response) readHead(head string) (length int, err error) {
	line, head, _ := strings.Cut(head, "\r\n")
	version, status, _ := strings.Cut(line, " ")
	code, reason, _ := strings.Cut(status, " ")
	a.code, err = strconv.Atoi(code)
	if version != "HTTP/1.1" && version != "HTTP/1.0" || len(code) != 3 || err != nil || a.code < 100 {
		return 0, errors.New("it is not HTTP/1.1")
	}
	a.reason = reason
	length = -1
	for line = range strings.SplitSeq(head, "\r\n") {
		name, value, _ := strings.Cut(line, ":")
		value = strings.Trim(value, " \t")
		switch {
		case strings.EqualFold(name, "Content-Length"):
			n, err := strconv.ParseUint(value, 10, 63)
			if err != nil || length >= 0 {
				return 0, errors.New("its Content-Length is no length")
			}
			if n > maxAnswer {
				return 0, fmt.Errorf("it is larger than %d bytes", maxAnswer)
			}
			length = int(n)
		case strings.EqualFold(name, "Transfer-Encoding"):
			return 0, errors.New("it has a Transfer-Encoding, where the agent gives a Content-Length")
		case strings.EqualFold(name, "Retry-After"):
			a.retryAfter = value
		}
	}
	if length < 0 {
		return 0, errors.New("it has no Content-Length")
	}
	return length, nil
}

// refusal is what an answer other than 200 means. None is permanent but one
// that says so of the question: what the API server refuses to tell the agent,
// it may tell the agent another time, and the plugin at once.
func (a *response) refusal() error {
	var status struct {
		Message string `json:"message"`
	}
	_ = json.Unmarshal(a.body, &status) // without a message, the code has to do
	const mostReason = 64
	err := fmt.Errorf("%d %s: %s", a.code, clip(a.reason, mostReason), clip(status.Message, maxMessage))
	switch a.code {
	case httpBadRequest:
		return Permanent(err)
	case httpUnauthorized, httpForbidden:
		return RetryAfter(fmt.Errorf("%w (allow the agent's service account to get pods in every namespace)", err), hungFor)
	}
	if s, parseErr := strconv.ParseUint(a.retryAfter, 10, 16); parseErr == nil {
		return RetryAfter(err, time.Duration(s)*time.Second)
	}
	return err
}

// clip gives at most so many bytes of a text, as valid UTF-8.
func clip(s string, most int) string {
	return strings.ToValidUTF8(s[:min(len(s), most)], "")
}
