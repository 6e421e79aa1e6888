// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// width is how many columns the table has where words allow it.
const width = 120

// WriteTable writes the report for people. Its last line is the datapath that a
// default pod would get. selfTest says that a self-test was asked for.
func (r *Report) WriteTable(w io.Writer, selfTest bool) {
	fmt.Fprintf(w, "Linux %s\n\n", r.Kernel)
	var rows [][]string
	group := ""
	for _, row := range r.Rows {
		if row.Group != group {
			group = row.Group
			rows = append(rows, []string{group + ":"})
		}
		answer, why := string(row.Answer), row.Why
		if rest, ok := strings.CutPrefix(why, NeedsRoot); ok && row.Answer == Unknown {
			answer += " (" + NeedsRoot + ")"
			why = strings.TrimPrefix(rest, ": ")
		}
		rows = append(rows, []string{"  " + row.Name, answer, dash(row.Since), row.NeededFor, why})
	}
	table(w, []string{"NAME", "ANSWER", "SINCE", "FOR", "WHY"}, rows)
	if selfTest {
		fmt.Fprintln(w, "\nself-test:")
		r.selfTestTable(w)
	}
	fmt.Fprintf(w, "\ndatapath of a default pod: %s: %s\n", r.Datapath, r.Reason)
}

func (r *Report) selfTestTable(w io.Writer) {
	if len(r.SelfTest) == 0 {
		fmt.Fprintln(w, "  no path can be tried here: see the rows above")
		return
	}
	var rows [][]string
	for _, c := range r.SelfTest {
		result, got := "ok", c.Got
		if !c.OK {
			result, got = "FAILED", fmt.Sprintf("%s (expected: %s)", c.Got, c.Expected)
		}
		rows = append(rows, []string{"  " + c.Path, result, c.Connection, got})
	}
	table(w, []string{"  PATH", "RESULT", "CONNECTION", "GOT"}, rows)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// table aligns columns. The last one is text, folded so that the whole is no
// wider than it should be; a row of one cell is a heading.
func table(w io.Writer, head []string, rows [][]string) {
	last := len(head) - 1
	room := width
	for i := range last {
		most := len(head[i])
		for _, row := range rows {
			if i < len(row) {
				most = max(most, len(row[i]))
			}
		}
		room -= most + 2
	}
	var lines bytes.Buffer
	t := tabwriter.NewWriter(&lines, 0, 0, 2, ' ', 0)
	for _, row := range append([][]string{head}, rows...) {
		if len(row) <= last {
			fmt.Fprintln(t, row[0]+strings.Repeat("\t", last))
			continue
		}
		for i, text := range fold(row[last], max(room, 40)) {
			if i > 0 {
				fmt.Fprint(t, strings.Repeat("\t", last))
			} else {
				fmt.Fprint(t, strings.Join(row[:last], "\t")+"\t")
			}
			fmt.Fprintln(t, text)
		}
	}
	_ = t.Flush() // into memory
	for line := range strings.Lines(lines.String()) {
		fmt.Fprintln(w, strings.TrimRight(line, " \n"))
	}
}

// fold breaks a text at blanks into lines of at most max bytes, where its words
// allow that. What comes from other programs stays on its line.
func fold(text string, most int) (lines []string) {
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len(line)+1+len(word) > most {
			lines = append(lines, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}
