// SPDX-License-Identifier: Apache-2.0

package realproxy

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"shunt.dev/shunt/internal/testbed"
)

// serveHTTP answers at an address, in the namespace that do runs in, with its
// name, the Host header, and whom it sees.
func serveHTTP(t *testing.T, do func(func() error) error, name, addr string) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	var l net.Listener
	if err := do(func() (err error) {
		l, err = lc.Listen(t.Context(), "tcp4", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			from, _, _ := net.SplitHostPort(r.RemoteAddr)
			fmt.Fprintf(w, "%s for %s, from %s, via %s", name, r.Host, from, r.Header.Get("Via"))
		}),
	}
	done := make(chan struct{})
	go func() {
		_ = server.Serve(l) // until it is closed
		close(done)
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
}

// get is a client in a shell: what it sends, and what comes back.
func get(addr netip.AddrPort) []string {
	return []string{"bash", "-c", fmt.Sprintf(
		`exec 3<>/dev/tcp/%s/%d; printf 'GET / HTTP/1.0\r\nHost: %s\r\n\r\n' >&3; cat <&3`, addr.Addr(), addr.Port(), addr)}
}

// squidConfig intercepts: squid asks SO_ORIGINAL_DST, refuses what does not go
// where the request's Host header says, and connects there itself. Towards its
// own app it takes the source address that is passed through.
const squidConfig = `
http_port 0.0.0.0:15001 intercept name=outbound
http_port 0.0.0.0:15006 intercept name=inbound
http_port 127.0.0.1:3128
acl inbound myportname inbound
tcp_outgoing_address 127.0.0.6 inbound
host_verify_strict on
http_access allow all
cache deny all
access_log none
cache_log /dev/null
pid_filename none
pinger_enable off
visible_hostname squid
dns_nameservers 127.0.0.1
shutdown_lifetime 0 seconds
`

// TestPrivilegedSquid: an interceptor of HTTP, which trusts SO_ORIGINAL_DST more
// than the client.
func TestPrivilegedSquid(t *testing.T) { eachPath(t, testSquid, eBPF, iptables) }

func testSquid(t *testing.T, on path) {
	squid := program(t, "squid")
	const port = 9090
	b := newBed(t, on, 80, port)
	serveHTTP(t, b.World.Do, "world", "10.99.3.4:80")
	serveHTTP(t, b.Do, "app", fmt.Sprintf("%s:%d", b.Addr4(), port))
	p := b.start(t, squidConfig, squid, "-N", "-d", "1", "-f", "%s")

	dst := netip.MustParseAddrPort("10.99.3.4:80")
	client := b.Start(t, testbed.ProcessSpec{Argv: get(dst), UID: testbed.AppUID, GID: testbed.AppGID})
	want := fmt.Sprintf("world for %s, from %s, via 1.0 squid", dst.Addr(), b.Addr4())
	testbed.Eventually(t, "the world's answer", func() bool { return !client.Running() })
	if got := client.Output(); !strings.Contains(got, want) {
		t.Errorf("outbound: %q, want %q; squid says:\n%s", got, want, p.Output())
	}

	dst = netip.AddrPortFrom(b.Addr4(), port)
	want = fmt.Sprintf("app for %s, from 127.0.0.6, via 1.0 squid", dst)
	if got := b.World.Command(t, get(dst)...); !strings.Contains(got, want) {
		t.Errorf("inbound: %q, want %q; squid says:\n%s", got, want, p.Output())
	}
}

// TestPrivilegedShadowsocks: ss-redir hands connections on to its server in the
// world, which connects to where the app wanted to go. It has one port: what comes
// in has no listener, and is refused.
func TestPrivilegedShadowsocks(t *testing.T) { eachPath(t, testShadowsocks, eBPF, iptables) }

func testShadowsocks(t *testing.T, on path) {
	redir, server := program(t, "ss-redir"), program(t, "ss-server")
	b := newBed(t, on, 8388)
	common := []string{"-s", "10.99.0.1", "-p", "8388", "-k", "test", "-m", "chacha20-ietf-poly1305"}
	cmd := exec.Command(server, common...)
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := b.World.Do(cmd.Start); err != nil { // the child has the thread's namespace
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it ends by that
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("ss-server says:\n%s", said.String())
		}
	})
	testbed.Eventually(t, "ss-server to listen", func() bool {
		return strings.Contains(b.World.Command(t, "cat", "/proc/self/net/tcp"), fmt.Sprintf(":%04X 00000000:0000 0A ", 8388))
	})
	argv := append([]string{redir, "-b", "0.0.0.0", "-l", "15001"}, common...)
	b.startUntil(t, testbed.ProcessSpec{Argv: argv}, testbed.OutboundPort)
	for _, s := range destinations {
		relayed(t, b.app.Actor, netip.MustParseAddrPort(s), "world")
	}
	if r := b.World.Connect(t, testbed.ConnectSpec{Dst: netip.AddrPortFrom(b.Addr4(), appPorts[0])}); r.Errno != "ECONNREFUSED" {
		t.Errorf("inbound, without a listener: %+v", r)
	}
}
