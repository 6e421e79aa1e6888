// SPDX-License-Identifier: Apache-2.0

package realproxy

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"shunt.dev/shunt/internal/testbed"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// The ports of the pod's app.
var appPorts = []uint16{8080, 9090}

// destinations are places in the world that the app connects to.
var destinations = []string{"10.99.3.4:80", "203.0.113.9:8443"}

// bed is a pod that the plugin has redirected to a proxy that is to come.
type bed struct {
	*testbed.Pod
	app *testbed.App
}

// A path is a way in which pods are redirected.
type path struct{ datapath, hook string }

var (
	eBPF     = path{"ebpf", "sk_lookup"}
	tc       = path{"ebpf", "tc"}
	iptables = path{"iptables", "auto"}
)

// eachPath runs a test on paths.
func eachPath(t *testing.T, test func(t *testing.T, on path), paths ...path) {
	t.Helper()
	testbed.Privileged(t)
	for _, on := range paths {
		t.Run(on.datapath+" "+on.hook, func(t *testing.T) { test(t, on) })
	}
}

// newBed begins a privileged test. The world answers everywhere but at the
// ports in except, as does the app.
func newBed(t *testing.T, on path, except ...uint16) *bed {
	t.Helper()
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	api, cni := testbed.NewAPIServer(t), testbed.NewCNI(t)
	cni.Config = map[string]any{"datapath": on.datapath, "inboundHook": on.hook}
	cni.Kubeconfig = api.WriteKubeconfig(t, t.TempDir())
	p := testbed.NewPod(t)
	p.World.ServeAll(t, except...)
	api.SetPod(t, p.Namespace, p.Name, p.Injected(testbed.ContainerPorts(appPorts...)))
	cni.MustAdd(t, p)
	t.Cleanup(func() {
		if r := cni.Del(t, p); !r.OK() {
			t.Errorf("DEL: %s", r)
		}
	})
	own := slices.DeleteFunc(slices.Clone(appPorts), func(port uint16) bool { return slices.Contains(except, port) })
	return &bed{Pod: p, app: p.StartApp(t, own...)}
}

// program finds an installed program, or skips the test.
func program(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range []string{"/usr/sbin/", "/usr/local/sbin/"} {
		if _, err := os.Stat(dir + name); err == nil {
			return dir + name
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("SKIP-MISSING: %s is not installed (apt-get install %s)", name, name)
	}
	return path
}

// start starts a proxy as the proxy's user, and waits until it listens on its
// two ports. %s in an argument is the file with its configuration.
func (b *bed) start(t *testing.T, config string, argv ...string) *testbed.Process {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "config")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{filepath.Dir(dir): 0o755, dir: 0o755, file: 0o644} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for i := range argv {
		argv[i] = strings.ReplaceAll(argv[i], "%s", file)
	}
	return b.startUntil(t, testbed.ProcessSpec{Argv: argv}, testbed.OutboundPort, testbed.InboundPort)
}

// startUntil starts a proxy as the proxy's user, and waits until it listens on
// ports.
func (b *bed) startUntil(t *testing.T, spec testbed.ProcessSpec, ports ...int) *testbed.Process {
	t.Helper()
	spec.UID, spec.GID, spec.Container = testbed.ProxyUID, testbed.ProxyGID, "proxy"
	argv := spec.Argv
	p := b.Start(t, spec)
	testbed.Eventually(t, argv[0]+" to listen", func() bool {
		if !p.Running() {
			t.Fatalf("%s has ended:\n%s", argv[0], p.Output())
		}
		// The wildcard address and the port in hexadecimal, in state LISTEN.
		four, err4 := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", p.PID))
		six, err6 := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp6", p.PID))
		return err4 == nil && err6 == nil && !slices.ContainsFunc(ports, func(port int) bool {
			return !strings.Contains(string(four), fmt.Sprintf(" 00000000:%04X 00000000:0000 0A ", port)) &&
				!strings.Contains(string(six), fmt.Sprintf(" %032X:%04X %032X:0000 0A ", 0, port, 0))
		})
	})
	return p
}

// relayed fails the test unless a connection was answered by listener on behalf
// of dst, through a proxy: the client believes that it talks to dst, and the
// server to somebody else than the client. It sends a line there and back.
func relayed(t *testing.T, client *testbed.Actor, dst netip.AddrPort, listener string) *testbed.Served {
	t.Helper()
	r := client.Connect(t, testbed.ConnectSpec{Dst: dst, Keep: true})
	if r.Errno != "" {
		t.Fatalf("to %s: %s at %s", dst, r.Errno, r.Step)
	}
	defer client.Close(t, r.Sock)
	if r.Listener() != listener || plain(r.Served.Local) != dst || plain(r.Peer) != dst {
		t.Errorf("to %s: served by %q on behalf of %s; the client sees %s", dst, r.Listener(), r.Served.Local, r.Peer)
	}
	if r.Served.Peer == r.Local {
		t.Errorf("to %s: no proxy was between %s and the server", dst, r.Local)
	}
	line := "to " + dst.String()
	if errno := client.Send(t, r.Sock, line+"\n"); errno != "" {
		t.Errorf("send to %s: %s", dst, errno)
	}
	if got, errno := client.RecvLine(t, r.Sock, 0); got != line || errno != "" {
		t.Errorf("from %s: %q, %s", dst, got, errno)
	}
	return r.Served
}

// plain is an address as it is spoken of, mapped or not.
func plain(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// haproxyConfig has HAProxy connect to where the client wanted to go, which it
// asks SO_ORIGINAL_DST for ("option transparent" without a server). It does so
// for IPv4 only, whatever redirects (proto_fam_inet4 and proto_fam_inet6 in its
// src/sock_inet.c): of an IPv6 connection it would take itself for the
// destination.
//
// Towards its own app it takes the source address that is passed through.
const haproxyConfig = `
global
	maxconn 64
	log stdout format raw local0

defaults
	mode tcp
	log global
	log-format "%[fe_name] %[dst]:%[dst_port]"
	timeout connect 10s
	timeout client 60s
	timeout server 60s

frontend outbound
	bind 0.0.0.0:15001
	default_backend original

frontend inbound
	bind 0.0.0.0:15006
	default_backend app

backend original
	option transparent

backend app
	option transparent
	source 127.0.0.6
`

func TestPrivilegedHAProxy(t *testing.T) { eachPath(t, testHAProxy, eBPF, iptables) }

func testHAProxy(t *testing.T, on path) {
	haproxy := program(t, "haproxy")
	b := newBed(t, on)
	p := b.start(t, haproxyConfig, haproxy, "-db", "-f", "%s")
	var logged []string
	for _, s := range destinations {
		dst := netip.MustParseAddrPort(s)
		served := relayed(t, b.app.Actor, dst, "world")
		if served.Peer.Addr().Unmap() != b.Addr4() {
			t.Errorf("to %s: the proxy's own connection comes from %s", dst, served.Peer)
		}
		logged = append(logged, "outbound "+s)
	}
	// A client of both families, as every Java program is.
	mapped := b.app.Connect(t, testbed.ConnectSpec{
		SocketSpec: testbed.SocketSpec{Family: 6}, Dst: netip.MustParseAddrPort("10.99.3.5:81"), Abort: true,
	})
	if mapped.Listener() != "world" || plain(mapped.Served.Local).String() != "10.99.3.5:81" {
		t.Errorf("from an IPv6 socket: %+v, %+v", mapped, mapped.Served)
	}
	logged = append(logged, "outbound 10.99.3.5:81")
	for _, port := range appPorts {
		dst := netip.AddrPortFrom(b.Addr4(), port)
		served := relayed(t, b.World.Actor, dst, "app")
		if got := served.Peer.Addr().Unmap().String(); got != "127.0.0.6" {
			t.Errorf("to %s: the app sees %s", dst, got)
		}
		logged = append(logged, "inbound "+dst.String())
	}
	for _, want := range logged {
		testbed.Eventually(t, fmt.Sprintf("%q in HAProxy's log", want), func() bool { return strings.Contains(p.Output(), want+"\n") })
	}
}

// upstream is what redsocks sends connections on to: a proxy in the world that
// speaks SOCKS5 and HTTP CONNECT, and answers itself in the name of whatever it
// is asked for, as the bed's listeners do.
type upstream struct {
	mu    sync.Mutex
	asked []string // "socks5 …", "connect …"
	conns map[net.Conn]bool
}

const upstreamAddr = "10.99.0.1:1080"

func startUpstream(t *testing.T, w *testbed.World) *upstream {
	t.Helper()
	u := &upstream{conns: map[net.Conn]bool{}}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	var l net.Listener
	err := w.Do(func() (err error) {
		l, err = lc.Listen(t.Context(), "tcp4", upstreamAddr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			u.mu.Lock()
			u.conns[c] = true
			u.mu.Unlock()
			wg.Go(func() {
				if err := u.serve(c); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
					t.Errorf("upstream: %v", err)
				}
				u.mu.Lock()
				delete(u.conns, c)
				u.mu.Unlock()
				c.Close()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		u.mu.Lock()
		for c := range u.conns {
			c.Close()
		}
		u.mu.Unlock()
		wg.Wait()
	})
	return u
}

// serve answers one connection until its client hangs up.
func (u *upstream) serve(c net.Conn) error {
	in := bufio.NewReader(c)
	first, err := in.Peek(1)
	if err != nil {
		return err
	}
	handshake, kind := httpConnect, "connect "
	if first[0] == 5 {
		handshake, kind = socks5, "socks5 "
	}
	dst, err := handshake(in, c)
	if err != nil {
		return fmt.Errorf("%shandshake: %w", kind, err)
	}
	u.mu.Lock()
	u.asked = append(u.asked, kind+dst.String())
	u.mu.Unlock()
	greeting, err := json.Marshal(testbed.Served{Listener: "upstream", SockInfo: testbed.SockInfo{Local: dst}})
	if err != nil {
		return err
	}
	if _, err := c.Write(append(greeting, '\n')); err != nil {
		return err
	}
	_, err = io.Copy(c, in)
	return err
}

// socks5 is the server's side of RFC 1928, for CONNECT to an IPv4 address
// without authentication.
func socks5(in *bufio.Reader, out io.Writer) (dst netip.AddrPort, err error) {
	var head [2]byte // version, number of methods
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return dst, err
	}
	if _, err := io.CopyN(io.Discard, in, int64(head[1])); err != nil {
		return dst, err
	}
	if _, err := out.Write([]byte{5, 0}); err != nil {
		return dst, err
	}
	var request [10]byte // version, command, 0, type, address, port
	if _, err := io.ReadFull(in, request[:]); err != nil {
		return dst, err
	}
	if request[0] != 5 || request[1] != 1 || request[3] != 1 {
		return dst, fmt.Errorf("request %x", request)
	}
	dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(request[4:8])), binary.BigEndian.Uint16(request[8:]))
	_, err = out.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
	return dst, err
}

// httpConnect is the server's side of HTTP's CONNECT.
func httpConnect(in *bufio.Reader, out io.Writer) (dst netip.AddrPort, err error) {
	r, err := http.ReadRequest(in)
	if err != nil {
		return dst, err
	}
	if r.Method != http.MethodConnect {
		return dst, fmt.Errorf("method %s", r.Method)
	}
	if dst, err = netip.ParseAddrPort(r.Host); err != nil {
		return dst, err
	}
	_, err = io.WriteString(out, "HTTP/1.0 200 Connection established\r\n\r\n")
	return dst, err
}

// redsocksConfig asks SO_ORIGINAL_DST on both ports ("redirector = iptables"),
// and tells the two upstream protocols.
const redsocksConfig = `
base {
	log_info = on;
	log = "stderr";
	daemon = off;
	redirector = iptables;
}
redsocks {
	local_ip = 0.0.0.0;
	local_port = 15001;
	ip = 10.99.0.1;
	port = 1080;
	type = socks5;
}
redsocks {
	local_ip = 0.0.0.0;
	local_port = 15006;
	ip = 10.99.0.1;
	port = 1080;
	type = http-connect;
}
`

func TestPrivilegedRedsocks(t *testing.T) { eachPath(t, testRedsocks, eBPF, iptables) }

func testRedsocks(t *testing.T, on path) {
	redsocks := program(t, "redsocks")
	b := newBed(t, on, 1080)
	u := startUpstream(t, b.World)
	b.start(t, redsocksConfig, redsocks, "-c", "%s")
	var want []string
	for _, s := range destinations {
		relayed(t, b.app.Actor, netip.MustParseAddrPort(s), "upstream")
		want = append(want, "socks5 "+s)
	}
	for _, port := range appPorts {
		dst := netip.AddrPortFrom(b.Addr4(), port)
		relayed(t, b.World.Actor, dst, "upstream")
		want = append(want, "connect "+dst.String())
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if got := strings.Join(u.asked, ", "); got != strings.Join(want, ", ") {
		t.Errorf("redsocks asked for %s; want %s", got, strings.Join(want, ", "))
	}
}
