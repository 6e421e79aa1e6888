// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
)

// quiet is the log of the Kubernetes libraries: they call an error what they
// will try again, for as long as an API server is down.
type quiet struct{ to slog.Handler }

// lower is the level that is told instead of one of theirs.
func lower(l slog.Level) slog.Level {
	switch {
	case l >= slog.LevelWarn:
		return slog.LevelInfo
	default:
		return slog.LevelDebug
	}
}

func (q quiet) Enabled(ctx context.Context, l slog.Level) bool { return q.to.Enabled(ctx, lower(l)) }

func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	r.Level = lower(r.Level)
	r.AddAttrs(slog.String("from", "client-go"))
	return q.to.Handle(ctx, r)
}

func (q quiet) WithAttrs(attrs []slog.Attr) slog.Handler { return quiet{q.to.WithAttrs(attrs)} }
func (q quiet) WithGroup(name string) slog.Handler       { return quiet{q.to.WithGroup(name)} }
