// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"shunt.dev/shunt/e2e/wire"
)

// An app serves, and dials whom the test names.
type application struct {
	mu    sync.Mutex
	early wire.Early
	held  map[string]*wire.Held
}

func app(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("app", flag.ContinueOnError)
	listen := flags.String("listen", ":"+strconv.Itoa(wire.AppPort), "addresses to serve on, comma separated")
	control := flags.String("control", ":"+strconv.Itoa(wire.ControlPort), "address of the test's own")
	early := flags.String("early", "", "dial this from the first moment on, for as long as the app runs")
	if err := flags.Parse(args); err != nil {
		return err
	}
	a := &application{held: map[string]*wire.Held{}}
	if *early != "" {
		go a.keepDialling(ctx, *early)
	}
	failed := make(chan error, 8)
	for _, addr := range strings.Split(*listen, ",") {
		go func() { failed <- serve(ctx, addr, answer("app"), nil) }()
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/dial", func(w http.ResponseWriter, r *http.Request) {
		reply(w, dial(r.Context(), r.FormValue("url"), time.Minute))
	})
	mux.HandleFunc("/resolve", func(w http.ResponseWriter, r *http.Request) {
		reply(w, resolve(r.Context(), r.FormValue("network"), r.FormValue("server"), r.FormValue("name")))
	})
	mux.HandleFunc("/hold", func(_ http.ResponseWriter, r *http.Request) { go a.hold(ctx, r.FormValue("url")) })
	mux.HandleFunc("/held", a.showHeld)
	mux.HandleFunc("/early", a.showEarly)
	go func() { failed <- serve(ctx, *control, mux, nil) }()
	return <-failed
}

// serve serves until ctx ends. No Multipath TCP: a proxy by such a listener is
// a test of its own.
func serve(ctx context.Context, addr string, h http.Handler, conn func(context.Context, net.Conn) context.Context) error {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	s := &http.Server{Handler: h, ConnContext: conn, ReadHeaderTimeout: time.Minute}
	go func() {
		<-ctx.Done()
		_ = s.Close()
	}()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func answer(who string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { reply(w, answerTo(who, r)) }
}

func answerTo(who string, r *http.Request) wire.Answer {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return wire.Answer{
		Who: who, Pod: os.Getenv("POD_NAME"), Peer: r.RemoteAddr, Local: local.String(), Through: r.Header.Values(wire.Header),
	}
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client has gone, and knows
}

// client is one connection's, and notes its addresses in d.
func client(d *wire.Dial, timeout time.Duration) *http.Client {
	var dialer net.Dialer
	dialer.SetMultipathTCP(false)
	return &http.Client{Timeout: timeout, Transport: &http.Transport{
		MaxIdleConns: 1, MaxConnsPerHost: 1,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			d.Peer, d.Local = c.RemoteAddr().String(), c.LocalAddr().String()
			return c, nil
		},
	}}
}

func request(ctx context.Context, c *http.Client, url string) (a wire.Answer, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return a, err
	}
	res, err := c.Do(req)
	if err != nil {
		return a, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(body, &a)
}

// dial makes one connection with one request.
func dial(ctx context.Context, url string, timeout time.Duration) (d wire.Dial) {
	c := client(&d, timeout)
	defer c.CloseIdleConnections()
	var err error
	if d.Answer, err = request(ctx, c, url); err != nil {
		d.Error = err.Error()
	}
	return d
}

// resolve asks a nameserver, over "udp" or "tcp".
func resolve(ctx context.Context, network, server, name string) (r wire.Resolved) {
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		d.SetMultipathTCP(false)
		return d.DialContext(ctx, network, server)
	}}
	var err error
	if r.Addrs, err = resolver.LookupHost(ctx, name); err != nil {
		r.Error = err.Error()
	}
	return r
}

// hold keeps one connection busy, and makes another only when that has failed. An
// http.Client would by itself, without an error: it gives a connection up when its
// own goroutines don't get a processor within 50 ms.
func (a *application) hold(ctx context.Context, url string) {
	var c net.Conn
	var answers *bufio.Reader
	defer func() {
		if c != nil {
			c.Close()
		}
	}()
	round := func() (dialled int, err error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return 0, err
		}
		if c == nil {
			var dialer net.Dialer
			dialer.SetMultipathTCP(false)
			if c, err = dialer.DialContext(ctx, "tcp", req.URL.Host); err != nil {
				c = nil
				return 0, err
			}
			dialled, answers = 1, bufio.NewReader(c)
		}
		err = c.SetDeadline(time.Now().Add(time.Minute))
		if err == nil {
			err = req.Write(c)
		}
		var res *http.Response
		if err == nil {
			res, err = http.ReadResponse(answers, req)
		}
		if err == nil {
			_, err = io.Copy(io.Discard, res.Body)
			err = errors.Join(err, res.Body.Close())
		}
		if err != nil {
			c.Close()
			c = nil
		}
		return dialled, err
	}
	for range ticks(ctx, 20*time.Millisecond) {
		dialled, err := round()
		a.mu.Lock()
		h := a.held[url]
		if h == nil {
			h = &wire.Held{}
			a.held[url] = h
		}
		h.Conns += dialled
		if err != nil {
			h.Error = err.Error()
		} else {
			h.Rounds++
		}
		a.mu.Unlock()
	}
}

func (a *application) showHeld(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var h wire.Held
	if got := a.held[r.FormValue("url")]; got != nil {
		h = *got
	}
	reply(w, h)
}

func (a *application) keepDialling(ctx context.Context, url string) {
	for wait := 10 * time.Millisecond; ctx.Err() == nil; {
		wait = min(2*wait, 100*time.Millisecond) // fifty that don't wait leave nothing for their proxies to start with
		d := dial(ctx, url, 5*time.Second)       // and then again
		a.mu.Lock()
		a.early.Tried++
		if d.Error == "" {
			a.early.Answered++
			if d.Answer.Who != "proxy" && len(d.Answer.Through) == 0 {
				a.early.Around = append(a.early.Around, d)
			}
		}
		a.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

func (a *application) showEarly(w http.ResponseWriter, _ *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	reply(w, a.early)
}

// ticks yields until ctx ends.
func ticks(ctx context.Context, every time.Duration) <-chan time.Time {
	out := make(chan time.Time)
	t := time.NewTicker(every)
	go func() {
		defer close(out)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case now := <-t.C:
				select {
				case out <- now:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out
}
