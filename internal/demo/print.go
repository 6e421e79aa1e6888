// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"fmt"
	"os"
	"strings"
)

// The output is at most this wide, in columns.
const width = 76

// style has the escape sequences of a terminal; all empty elsewhere.
var style = func() (s struct{ bold, dim, good, bad, off string }) {
	st, err := os.Stdout.Stat()
	if err == nil && st.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" {
		s.bold, s.dim, s.good, s.bad, s.off = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[31m", "\x1b[0m"
	}
	return s
}()

func (d *demo) title(text string) {
	fmt.Printf("%s%s%s\n\n", style.bold, text, style.off)
}

// step begins a scene, unless the user wants to stop.
func (d *demo) step(name, what string) {
	d.check()
	fmt.Printf("\n%s%s%s  %s\n", style.bold, name, style.off, what)
}

// say prints a line with a label.
func (d *demo) say(label, format string, args ...any) {
	fmt.Printf("    %s%-9s%s %s\n", style.dim, label, style.off, fmt.Sprintf(format, args...))
}

// expect prints a line, and whether it is as it should be.
func (d *demo) expect(ok bool, label, format string, args ...any) {
	mark := style.good + "ok" + style.off
	if !ok {
		mark = style.bad + "WRONG" + style.off
		d.wrong++
	}
	text := fmt.Sprintf(format, args...)
	fmt.Printf("    %s%-9s%s %-*s %s\n", style.dim, label, style.off, width-4-9-1-3, text, mark)
}

// folded prints a long line in several.
func (d *demo) folded(label, text string) {
	const room = width - 4 - 9 - 1
	for len(text) > 0 {
		cut := min(room, len(text))
		if i := strings.LastIndexAny(text[:cut], ", "); i > 0 && cut < len(text) {
			cut = i + 1
		}
		d.say(label, "%s", strings.TrimSpace(text[:cut]))
		label, text = "", text[cut:]
	}
}
