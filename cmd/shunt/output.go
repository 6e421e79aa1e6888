// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// A format is how a reader writes: the flag -o.
type format string

const (
	asTable format = "table"
	asJSON  format = "json"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "table|json" }

func (f *format) Set(s string) error {
	if s != string(asTable) && s != string(asJSON) {
		return fmt.Errorf("expected table or json")
	}
	*f = format(s)
	return nil
}

// formatFlag gives a reader its -o.
func formatFlag(cmd *cobra.Command) *format {
	f := asTable
	cmd.Flags().VarP(&f, "output", "o", "how to write it")
	return &f
}

// write writes v as JSON, or has it written as text.
func (f *format) write(w io.Writer, v any, text func(w io.Writer)) error {
	var b strings.Builder
	if *f == asJSON {
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		if err := enc.Encode(v); err != nil {
			return err
		}
	} else {
		text(&b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// columns writes rows of cells, parted by tabs, under each other.
func columns(w io.Writer, rows func(w io.Writer)) {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	rows(t)
	_ = t.Flush() // to a strings.Builder
}
