// SPDX-License-Identifier: Apache-2.0

package podfacts

import (
	"bytes"
	"fmt"
	"testing"
	"unicode/utf8"
)

// FuzzAnswer: whatever is behind the agent's socket, it gives a pod or an error
// of a bounded size, in valid UTF-8.
func FuzzAnswer(f *testing.F) {
	body := `{"metadata":{"namespace":"a","name":"b","uid":"1"},"spec":{"containers":[{"name":"istio-proxy"}]}}`
	f.Add([]byte(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)))
	f.Add([]byte("HTTP/1.1 503 x\r\nRetry-After: 1\r\nContent-Length: 17\r\n\r\n{\"message\":\"busy\"}"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"a\":\r\n0\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 99999999999 OK\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		pod, err := readPod(bytes.NewReader(data))
		if (pod == nil) == (err == nil) {
			t.Errorf("pod %v, error %v", pod, err)
		}
		if err != nil && (len(err.Error()) > 1<<10 || !utf8.ValidString(err.Error())) {
			t.Errorf("the error has %d bytes: %q", len(err.Error()), err)
		}
	})
}
