// SPDX-License-Identifier: Apache-2.0

// Package wire is what the tests and the workload in their pods tell each
// other, in JSON over HTTP.
package wire

// The ports of the workload beside the proxy's own.
const (
	AppPort     = 8080
	ControlPort = 9000
	ProxyPort   = 15020
	DNSPort     = 15053 // of the proxy, at loopback
)

// Answer is what a server says of the connection that a request came by.
type Answer struct {
	Who   string // "app", "proxy", or what a test calls its own server
	Pod   string
	Peer  string // of the accepted socket
	Local string // of the accepted socket
	// SO_ORIGINAL_DST of the accepted socket, at the proxy.
	OriginalDst string
	// What proxies that pass requests on have put into the header.
	Through []string
}

// Header is what HAProxy, in a test's configuration, adds to what it passes on.
const Header = "X-Through"

// Dial is what became of a connection.
type Dial struct {
	Answer Answer
	Peer   string // as the client's getpeername has it
	Local  string
	Error  string
}

// Resolved is what the app's resolver has found.
type Resolved struct {
	Addrs []string
	Error string
}

// Held is the state of a connection that the app keeps busy.
type Held struct {
	Rounds int // requests that were answered
	Conns  int // connections that it took: 1 while the first lives
	Error  string
}

// Early is what the app has found by dialling from its very first moment on.
type Early struct {
	Tried    int
	Answered int
	// Answers that came neither from the proxy nor through one.
	Around []Dial
}

// Inbound is a connection that the proxy has passed on to its app.
type Inbound struct {
	Peer        string
	OriginalDst string
	Error       string
}
