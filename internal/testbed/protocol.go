// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"net/netip"
	"time"
)

// OrigDst is what a socket answers to SO_ORIGINAL_DST at one level.
type OrigDst struct {
	Errno string         `json:"errno,omitempty"` // "" = success
	Addr  netip.AddrPort `json:"addr"`
	Len   int            `json:"len,omitempty"` // optlen after the call, bytes
}

// OK says whether the socket gave an address.
func (o OrigDst) OK() bool { return o.Errno == "" }

// SockInfo is what a socket says of itself. An address that can't be had is
// the zero AddrPort. IPv4 addresses on an IPv6 socket stay mapped, as the
// kernel gave them: use Unmap on the Addr to compare.
type SockInfo struct {
	Peer  netip.AddrPort `json:"peer"`
	Local netip.AddrPort `json:"local"`
	// The address by SOL_IP option 80 and by SOL_IPV6 option 80, asked with
	// buffers of sizeof(sockaddr_in) and sizeof(sockaddr_in6).
	OrigDst4 OrigDst `json:"od4"`
	OrigDst6 OrigDst `json:"od6"`
}

// OrigDst gives the original destination by the level that fits the socket: of
// IPv6 for an IPv6 peer, else of IPv4.
func (s SockInfo) OrigDst() OrigDst {
	if a := s.Local.Addr(); a.Is6() && !a.Is4In6() {
		return s.OrigDst6
	}
	return s.OrigDst4
}

// Served is a connection as the side that accepted it saw it.
type Served struct {
	Listener string `json:"listener"` // the listener's name: "out", "in", "app", "world"
	Actor    string `json:"actor"`    // the name of the actor that has it
	PID      int    `json:"pid"`
	SockInfo
	// First is what came with or before the accept, at most 256 bytes; in
	// [Listener.Accepted] also what came later.
	First string `json:"first,omitempty"`
}

// SocketSpec says what a socket is like before it connects.
type SocketSpec struct {
	Family      int            `json:"family,omitempty"` // 4 or 6; 0 = the destination's
	MPTCP       bool           `json:"mptcp,omitempty"`
	UDP         bool           `json:"udp,omitempty"`        // for Socket; see [Actor.Take]
	Ping        bool           `json:"ping,omitempty"`       // likewise, of ICMP; see [Pod.EnablePing]
	Bind        netip.AddrPort `json:"bind"`                 // bind first, where valid; port 0 = any
	BindNoPort  bool           `json:"bindNoPort,omitempty"` // IP_BIND_ADDRESS_NO_PORT
	ReuseAddr   bool           `json:"reuseAddr,omitempty"`
	ReusePort   bool           `json:"reusePort,omitempty"`
	V6Only      bool           `json:"v6only,omitempty"`
	Device      string         `json:"device,omitempty"`      // SO_BINDTODEVICE
	Transparent bool           `json:"transparent,omitempty"` // IP_TRANSPARENT; needs CAP_NET_ADMIN
	Mark        int            `json:"mark,omitempty"`        // SO_MARK; needs CAP_NET_ADMIN
	// FSUID and FSGID are the file system ids while the socket is created:
	// its owner, as iptables' owner match sees it. Changing them needs
	// CAP_SETUID and CAP_SETGID.
	FSUID *int `json:"fsuid,omitempty"`
	FSGID *int `json:"fsgid,omitempty"`
}

// ConnectSpec is one connect and what goes with it.
type ConnectSpec struct {
	SocketSpec
	// Sock is a kept socket to connect (again); 0 creates one by SocketSpec,
	// which is otherwise ignored, except Family for the form of the address.
	Sock int            `json:"sock,omitempty"`
	Dst  netip.AddrPort `json:"dst"`

	Nonblock        bool   `json:"nonblock,omitempty"`        // O_NONBLOCK, then poll
	FastOpen        bool   `json:"fastOpen,omitempty"`        // sendto(MSG_FASTOPEN) of Data in place of connect
	FastOpenConnect bool   `json:"fastOpenConnect,omitempty"` // TCP_FASTOPEN_CONNECT, then connect and send of Data
	IOURing         bool   `json:"ioUring,omitempty"`         // connect by io_uring
	Data            string `json:"data,omitempty"`            // sent on success, with a newline added
	NoGreeting      bool   `json:"noGreeting,omitempty"`      // don't wait for the server's line
	AwaitClose      bool   `json:"awaitClose,omitempty"`      // wait for the server to close first; see ListenSpec.CloseFirst
	Keep            bool   `json:"keep,omitempty"`            // keep the socket open, success or not
	Abort           bool   `json:"abort,omitempty"`           // close with a reset: no TIME_WAIT is left
	// Timeout of the connect, and again of the greeting; 0 = 5 s.
	Timeout time.Duration `json:"timeout,omitempty"`
}

// Steps of a connect, in [ConnectResult.Step].
const (
	StepSocket   = "socket"   // creating the socket, and its options
	StepBind     = "bind"     //
	StepConnect  = "connect"  //
	StepGreeting = "greeting" // connected, but no greeting came
	StepClose    = "close"    // connected and greeted, but the server did not close
)

// Errno names of the bed's own.
const (
	// ErrnoTimeout: the bed's time was up, the kernel had said nothing.
	ErrnoTimeout = "TIMEOUT"
	// ErrnoEOF: the peer closed before its greeting was whole.
	ErrnoEOF = "EOF"
)

// ConnectResult is the outcome of a ConnectSpec.
type ConnectResult struct {
	Errno string `json:"errno,omitempty"` // "" = success
	Step  string `json:"step,omitempty"`  // where it failed
	SockInfo
	Served  *Served       `json:"served,omitempty"` // what the server said
	Sock    int           `json:"sock,omitempty"`   // with Keep
	Elapsed time.Duration `json:"elapsed"`          // of the connect alone
}

// AtOnce says that no SYN was lost on the way: it is sent again after a second
// (TCP_TIMEOUT_INIT). Whatever takes less may be the machine, which is busy.
func (r ConnectResult) AtOnce() bool { return r.Elapsed < 990*time.Millisecond }

// Connected says whether the connect itself succeeded.
func (r ConnectResult) Connected() bool {
	return r.Errno == "" || r.Step == StepGreeting || r.Step == StepClose
}

// Listener gives the name of the listener that served, or "".
func (r ConnectResult) Listener() string {
	if r.Served == nil {
		return ""
	}
	return r.Served.Listener
}

// ListenSpec is a listener. An accepted connection is greeted at once with a
// line of JSON ([Served]); from then on every line that comes is sent back.
type ListenSpec struct {
	Name        string         `json:"name"`
	Addr        netip.AddrPort `json:"addr"` // of family 6 and not V6Only: for both families
	V6Only      bool           `json:"v6only,omitempty"`
	ReusePort   bool           `json:"reusePort,omitempty"`
	NoReuseAddr bool           `json:"noReuseAddr,omitempty"` // SO_REUSEADDR is set otherwise
	Transparent bool           `json:"transparent,omitempty"` // IP_TRANSPARENT; needs CAP_NET_ADMIN
	MPTCP       bool           `json:"mptcp,omitempty"`
	Device      string         `json:"device,omitempty"`
	Backlog     int            `json:"backlog,omitempty"`     // 0 = 1024
	FastOpen    int            `json:"fastOpen,omitempty"`    // TCP_FASTOPEN queue length
	NoAccept    bool           `json:"noAccept,omitempty"`    // never accept: a frozen server
	CloseFirst  bool           `json:"closeFirst,omitempty"`  // close after the greeting: TIME_WAIT is the server's, if the client has AwaitClose
	Silent      bool           `json:"silent,omitempty"`      // no greeting
	BindOnly    bool           `json:"bindOnly,omitempty"`    // bind, but don't listen yet
	Forget      bool           `json:"forget,omitempty"`      // don't record what was accepted
	Sock        int            `json:"sock,omitempty"`        // listen on a kept (bound) socket
	DeferAccept int            `json:"deferAccept,omitempty"` // TCP_DEFER_ACCEPT, seconds
}

// request is what a test asks of an actor; response is the answer. One JSON
// value a line each way; answers come in any order.
type request struct {
	ID      int           `json:"id"`
	Verb    string        `json:"verb"`
	Sock    int           `json:"sock,omitempty"`
	Socket  *SocketSpec   `json:"socket,omitempty"`
	Connect []ConnectSpec `json:"connect,omitempty"`
	Listen  *ListenSpec   `json:"listen,omitempty"`
	Data    string        `json:"data,omitempty"`
	Timeout time.Duration `json:"timeout,omitempty"`
	Int     [3]int        `json:"int"`
}

type response struct {
	ID       int             `json:"id"`
	Misuse   string          `json:"misuse,omitempty"` // the bed was used wrongly
	Errno    string          `json:"errno,omitempty"`  // of the verb's system call
	Sock     int             `json:"sock,omitempty"`
	Connect  []ConnectResult `json:"connect,omitempty"`
	Info     *SockInfo       `json:"info,omitempty"`
	Accepted []Served        `json:"accepted,omitempty"`
	Data     []byte          `json:"data,omitempty"`
	Int      int             `json:"int,omitempty"`
}
