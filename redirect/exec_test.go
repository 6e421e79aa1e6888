// SPDX-License-Identifier: Apache-2.0

//go:build linux

package redirect_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// envExec makes a process of this binary one that connects, and says who serves
// it: "DESTINATION [SOCKET]". With envNext it makes the socket, and leaves the rest
// to the program of that path, by exec.
const (
	envExec = "SHUNT_TEST_CONNECT"
	envNext = "SHUNT_TEST_NEXT"
)

func init() {
	if what := os.Getenv(envExec); what != "" {
		if err := connectAs(what); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

func connectAs(what string) error {
	dst, inherited, _ := strings.Cut(what, " ")
	to, err := netip.ParseAddrPort(dst)
	if err != nil {
		return err
	}
	var fd int
	domain := unix.AF_INET
	if to.Addr().Is6() {
		domain = unix.AF_INET6
	}
	if inherited != "" {
		if fd, err = strconv.Atoi(inherited); err != nil {
			return err
		}
	} else if fd, err = unix.Socket(domain, unix.SOCK_STREAM, 0); err != nil { // not close-on-exec
		return err
	}
	if next := os.Getenv(envNext); next != "" {
		return unix.Exec(next, []string{next}, []string{envExec + "=" + dst + " " + strconv.Itoa(fd)})
	}
	if err := unix.Connect(fd, sockaddrOf(to, familyOf(to.Addr()))); err != nil {
		return err
	}
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}) // no TIME_WAIT
	var line []byte
	for buf := make([]byte, 2048); !strings.Contains(string(line), "\n"); {
		n, err := unix.Read(fd, buf)
		if err != nil || n == 0 {
			return errors.Join(err, errors.New("no greeting"))
		}
		line = append(line, buf[:n]...)
	}
	_, err = os.Stdout.Write(line)
	return err
}

// setuid makes a copy of this binary that whoever executes it executes as another.
func setuid(t testing.TB, uid, gid int, bits os.FileMode) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "program")
	from, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(to, from)
	// Chown takes the bits away.
	if err := errors.Join(err, to.Close(), os.Chown(path, uid, gid), os.Chmod(path, 0o755|bits)); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestPrivilegedExec: who executes a setuid or setgid program owns what that
// creates as its file's owner does; what is inherited over exec stays its
// creator's. On every backend.
func TestPrivilegedExec(t *testing.T) {
	begin(t)
	const proxyUID, proxyGID, appUID, appGID, other = testbed.ProxyUID, testbed.ProxyGID, testbed.AppUID, testbed.AppGID, 4321
	plain := setuid(t, 0, 0, 0)
	asProxy := setuid(t, proxyUID, 0, os.ModeSetuid)
	asApp := setuid(t, appUID, 0, os.ModeSetuid)
	asRoot := setuid(t, 0, 0, os.ModeSetuid)
	ofProxys := setuid(t, 0, proxyGID, os.ModeSetgid)
	ofOthers := setuid(t, 0, other, os.ModeSetgid)
	for _, n := range nodes(t, anyone) {
		t.Run(n.name, func(t *testing.T) {
			p := n.pod(t, nil)
			for _, x := range []struct {
				what          string
				uid, gid      int
				program, next string
				owner, group  int
			}{
				{"the app", appUID, appGID, plain, "", appUID, appGID},
				{"the app, by a program of the proxy's", appUID, appGID, asProxy, "", proxyUID, appGID},
				{"the app, by a program of the proxy's group", appUID, appGID, ofProxys, "", appUID, proxyGID},
				{"the proxy", proxyUID, proxyGID, plain, "", proxyUID, proxyGID},
				{"the proxy's uid, by a program of root's", proxyUID, other, asRoot, "", 0, other},
				{"the proxy's gid, by a program of another group", other, proxyGID, ofOthers, "", other, other},
				{"made by the proxy, connected by the app", proxyUID, other, plain, asApp, proxyUID, other},
				{"made by the app, connected by the proxy", appUID, appGID, plain, asProxy, appUID, appGID},
				{"made by a program of the proxy's, connected by one of root's", appUID, appGID, asProxy, asRoot, proxyUID, appGID},
				{"made by the proxy's group, connected by another", other, proxyGID, plain, ofOthers, other, proxyGID},
			} {
				for _, dst := range []string{"10.99.1.1:80", "[fd99::5]:80"} {
					env := []string{envExec + "=" + dst}
					if x.next != "" {
						env = append(env, envNext+"="+x.next)
					}
					proc := p.Start(t, testbed.ProcessSpec{Argv: []string{x.program}, UID: x.uid, GID: x.gid, Env: env})
					status := proc.Wait(t)
					var served testbed.Served
					if err := json.Unmarshal([]byte(proc.Output()), &served); err != nil || status != 0 {
						t.Errorf("%s: to %s: exit status %d: %s", x.what, dst, status, proc.Output())
						continue
					}
					want := "out"
					if x.owner == proxyUID || x.group == proxyGID {
						want = "world"
					}
					if served.Listener != want {
						t.Errorf("%s: to %s: served by %q, want %q", x.what, dst, served.Listener, want)
					}
				}
			}
		})
	}
}

// TestPrivilegedRestart: the proxy is restarted while connections keep coming, out
// of the pod and into it: the old one or the new serves each, or it is refused, or
// reset by the one that ends. Nobody reaches where it was going by itself, and
// nobody waits. On every backend.
func TestPrivilegedRestart(t *testing.T) {
	begin(t)
	const restarts = 8
	for _, n := range nodes(t, anyone) {
		t.Run(n.name, func(t *testing.T) {
			p := n.pod(t, includeAll, noListeners...)
			start := func(i int) *testbed.Actor {
				a := p.Actor(t, fmt.Sprint("proxy ", i), testbed.ProxyUID, testbed.ProxyGID)
				a.Listen(t, testbed.ListenSpec{Name: "out", Addr: ap("[::]:15001"), Forget: true})
				in := listenIn("[::]:15006")
				in.Forget = true
				a.Listen(t, in)
				return a
			}
			type load struct {
				by    string
				dst   []string
				goes  string
				tried map[string]int
			}
			loads := []*load{
				{app, []string{"10.99.1.1:80", "[fd99::5]:443"}, "out", nil},
				{world, []string{at(p.Addr4(), 8080).String(), at(p.Addr6(), 8080).String()}, "in", nil},
			}
			end, ended := make(chan struct{}), make(chan struct{}, len(loads))
			by := make(chan string, 1024) // who serves; dropped when nobody looks
			for _, l := range loads {
				l.tried = map[string]int{}
				go func() {
					defer func() { ended <- struct{}{} }()
					for {
						select {
						case <-end:
							return
						default:
						}
						var specs []testbed.ConnectSpec
						for i := range 10 {
							specs = append(specs, testbed.ConnectSpec{Dst: ap(l.dst[i%2]), Abort: true})
						}
						for _, r := range p.who(l.by).ConnectBatch(t, specs) {
							if r.Served == nil {
								l.tried[r.Errno+" at "+r.Step]++
								continue
							}
							l.tried[r.Listener()]++
							select {
							case by <- r.Listener() + " of " + r.Served.Actor:
							default:
							}
						}
					}
				}()
			}
			proxy := start(0)
			for i := range restarts {
				serving := map[string]bool{}
				timeout := time.After(settled)
				for name := fmt.Sprint(" of proxy ", i); !serving["out"+name] || !serving["in"+name]; {
					select {
					case who := <-by:
						serving[who] = true
					case <-timeout:
						t.Fatalf("proxy %d serves %v", i, serving)
					}
				}
				if i%2 == 0 {
					proxy.Stop(t)
				} else {
					proxy.Kill(t)
				}
				proxy = start(i + 1)
			}
			close(end)
			for range loads {
				<-ended
			}
			for _, l := range loads {
				t.Logf("%s: %v", l.goes, l.tried)
				for what, count := range l.tried {
					switch what {
					case l.goes, "ECONNREFUSED at connect", "ECONNRESET at connect", "ECONNRESET at greeting", testbed.ErrnoEOF + " at greeting":
					default:
						t.Errorf("%s by %s: %d were %s", l.goes, l.by, count, what)
					}
				}
				if l.tried["ECONNREFUSED at connect"] == 0 {
					t.Errorf("%s by %s: none was refused: %v", l.goes, l.by, l.tried)
				}
			}
			if n.bpfDir != "" {
				if decided := n.counted(t, p.Pod); decided[redirect.RuleOutIncludeCIDR] == 0 || decided[redirect.RuleInInclude] == 0 {
					t.Errorf("decided %v", decided)
				}
			}
		})
	}
}
