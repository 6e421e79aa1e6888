// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"shunt.dev/shunt/internal/spool"
)

// relayInterval is how late the plugin's lines may be in the agent's log.
const relayInterval = time.Second

// A relay takes what the plugin has written for the agent: lines of its log,
// and what became of pods.
type relay struct {
	runDir string
	// log gets the plugin's lines whatever its own level is: they have passed
	// the plugin's.
	log     slog.Handler
	metrics *metrics

	mu  sync.Mutex // held by who drains
	err error      // of the last call, to say each once
}

func (r *relay) run(ctx context.Context, beat func()) error {
	return every(ctx, relayInterval, beat, func(ctx context.Context) { r.drain(ctx) })
}

// drain hands on what is there, unless somebody is at it.
func (r *relay) drain(ctx context.Context) {
	if !r.mu.TryLock() {
		return
	}
	defer r.mu.Unlock()
	_, err := spool.Drain(r.runDir, func(line []byte) { r.line(ctx, line) })
	if err != nil && (r.err == nil || r.err.Error() != err.Error()) {
		slog.New(r.log).Error("what the plugin has logged can't be read", "error", err)
	}
	r.err = err
}

func (r *relay) line(ctx context.Context, line []byte) {
	record, ok := parseLine(line)
	if !ok {
		record = slog.NewRecord(time.Now(), slog.LevelWarn, "a line of the plugin's log can't be read", 0)
		record.AddAttrs(slog.String("line", string(line)))
	}
	record.AddAttrs(slog.String("from", "shunt-cni"))
	if s, ok := spool.ParseSetup(line); ok {
		r.setup(s)
		// The plugin writes these whatever its level is.
		if !r.log.Enabled(ctx, record.Level) {
			return
		}
	}
	_ = r.log.Handle(ctx, record) // where the log itself fails, nobody can be told
}

// backendNone is the backend of an ADD that failed before that was known.
const backendNone = "none"

func (r *relay) setup(s spool.Setup) {
	backend := cmp.Or(s.Backend, backendNone)
	r.metrics.setup.WithLabelValues(backend, s.Result).Observe(s.Seconds)
	if s.Fallback {
		r.metrics.fallbacks.WithLabelValues(s.Reason).Inc()
	}
}

// parseLine reads a line as slog.JSONHandler writes it, with its fields in
// their order.
func parseLine(line []byte) (slog.Record, bool) {
	var at time.Time
	level, msg := slog.LevelInfo, ""
	attrs, ok := fieldsOf(line, true)
	attrs = slices.DeleteFunc(attrs, func(a slog.Attr) bool {
		var err error
		switch text := a.Value.String(); a.Key {
		case slog.TimeKey:
			err = at.UnmarshalText([]byte(text))
		case slog.LevelKey:
			err = level.UnmarshalText([]byte(text))
		case slog.MessageKey:
			msg = text
		default:
			return false
		}
		ok = ok && err == nil
		return true
	})
	if !ok || msg == "" {
		return slog.Record{}, false
	}
	record := slog.NewRecord(at, level, msg, 0)
	record.AddAttrs(attrs...)
	return record, true
}

// fieldsOf reads an object's members. An object among them becomes a group,
// where groups are asked for; what else is no string is told as it is.
func fieldsOf(object []byte, groups bool) (attrs []slog.Attr, ok bool) {
	dec := json.NewDecoder(bytes.NewReader(object))
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		return nil, false
	}
	for dec.More() {
		tok, err := dec.Token()
		key, _ := tok.(string) // an object's odd tokens are its keys
		var raw json.RawMessage
		if err = errors.Join(err, dec.Decode(&raw)); err != nil {
			return nil, false
		}
		value := slog.StringValue(string(raw))
		switch raw[0] {
		case '"':
			var text string
			if err := json.Unmarshal(raw, &text); err != nil {
				return nil, false
			}
			value = slog.StringValue(text)
		case '{':
			if members, ok := fieldsOf(raw, false); ok && groups {
				value = slog.GroupValue(members...)
			}
		}
		attrs = append(attrs, slog.Attr{Key: key, Value: value})
	}
	_, err := dec.Token()
	return attrs, err == nil
}
