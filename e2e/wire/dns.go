// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Addrs is what a nameserver of these tests answers: of any name the same, so
// that the answer tells who was asked.
type Addrs struct{ V4, V6 netip.Addr }

var (
	// ProxyAddrs is what the proxy answers.
	ProxyAddrs = Addrs{netip.MustParseAddr("10.99.0.7"), netip.MustParseAddr("2001:db8::7")}
	// SinkAddrs is what the nameserver outside of the mesh answers.
	SinkAddrs = Addrs{netip.MustParseAddr("10.99.0.8"), netip.MustParseAddr("2001:db8::8")}
)

// ServeDNS is a nameserver over UDP and TCP until ctx ends.
func ServeDNS(ctx context.Context, addr string, addrs Addrs) error {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	udp, err := lc.ListenPacket(ctx, "udp", addr)
	if err != nil {
		return err
	}
	defer udp.Close()
	tcp, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer tcp.Close()
	failed := make(chan error, 2)
	go func() { failed <- addrs.packets(udp) }()
	go func() { failed <- addrs.streams(tcp) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}

func (a Addrs) packets(c net.PacketConn) error {
	buf := make([]byte, 4096)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		if reply, err := a.answer(buf[:n]); err == nil {
			_, _ = c.WriteTo(reply, from) // who asked asks again, or has gone
		}
	}
}

func (a Addrs) streams(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			for a.stream(c) == nil {
			}
		}()
	}
}

// stream answers one question of a connection. Over TCP a message comes behind
// its length (RFC 1035, 4.2.2).
func (a Addrs) stream(c net.Conn) error {
	var length uint16
	if err := binary.Read(c, binary.BigEndian, &length); err != nil {
		return err
	}
	question := make([]byte, length)
	if _, err := io.ReadFull(c, question); err != nil {
		return err
	}
	reply, err := a.answer(question)
	if err != nil {
		return err
	}
	_, err = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...)) //nolint:gosec // far less than 64 KiB
	return err
}

// answer gives the reply to a question for an address; of another type there is
// nothing.
func (a Addrs) answer(message []byte) ([]byte, error) {
	var p dnsmessage.Parser
	head, err := p.Start(message)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	if head.Response {
		return nil, errors.New("a response, not a question")
	}
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: head.ID, Response: true, RecursionDesired: head.RecursionDesired, RecursionAvailable: true})
	record := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}
	err = errors.Join(b.StartQuestions(), b.Question(q), b.StartAnswers())
	switch q.Type {
	case dnsmessage.TypeA:
		err = errors.Join(err, b.AResource(record, dnsmessage.AResource{A: a.V4.As4()}))
	case dnsmessage.TypeAAAA:
		err = errors.Join(err, b.AAAAResource(record, dnsmessage.AAAAResource{AAAA: a.V6.As16()}))
	}
	if err != nil {
		return nil, fmt.Errorf("answer to %s %s: %w", q.Type, q.Name, err)
	}
	return b.Finish()
}
