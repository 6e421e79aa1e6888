// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"html"
	"path"
	"regexp"
	"strings"
	"unicode/utf8"
)

// A document is the report, before it is Markdown or HTML. Its texts may have
// **bold** and `code`, and nothing else.
type document struct{ blocks []block }

type block interface {
	markdown(*strings.Builder)
	html(*strings.Builder)
}

func (d *document) add(b block) { d.blocks = append(d.blocks, b) }

type heading struct {
	level int
	text  string
}

type paragraph string

type list []string

type table struct {
	head []string
	rows [][]string
	// texts is how many columns, from the left, are words and not numbers.
	texts int
}

// A figure is a plot: a file of its own beside the Markdown, and in line in HTML.
type figure struct {
	file, alt, svg string
}

func (h heading) markdown(b *strings.Builder) {
	fmt.Fprintf(b, "%s %s\n\n", strings.Repeat("#", h.level), h.text)
}

func (h heading) html(b *strings.Builder) {
	fmt.Fprintf(b, "<h%d>%s</h%d>\n", h.level, inline(h.text), h.level)
}

func (p paragraph) markdown(b *strings.Builder) { fmt.Fprintf(b, "%s\n\n", string(p)) }
func (p paragraph) html(b *strings.Builder)     { fmt.Fprintf(b, "<p>%s</p>\n", inline(string(p))) }

func (l list) markdown(b *strings.Builder) {
	for _, item := range l {
		fmt.Fprintf(b, "- %s\n", item)
	}
	b.WriteByte('\n')
}

func (l list) html(b *strings.Builder) {
	b.WriteString("<ul>\n")
	for _, item := range l {
		fmt.Fprintf(b, "<li>%s</li>\n", inline(item))
	}
	b.WriteString("</ul>\n")
}

func (t table) markdown(b *strings.Builder) {
	row := func(cells []string) {
		for _, c := range cells {
			b.WriteString("| " + strings.ReplaceAll(c, "|", `\|`) + " ")
		}
		b.WriteString("|\n")
	}
	row(t.head)
	for i := range t.head {
		if i < t.texts {
			b.WriteString("|---")
		} else {
			b.WriteString("|--:")
		}
	}
	b.WriteString("|\n")
	for _, r := range t.rows {
		row(r)
	}
	b.WriteByte('\n')
}

func (t table) html(b *strings.Builder) {
	row := func(tag string, cells []string) {
		b.WriteString("<tr>")
		for i, c := range cells {
			class := ""
			if i >= t.texts {
				class = ` class="n"`
			}
			fmt.Fprintf(b, "<%s%s>%s</%s>", tag, class, inline(c), tag)
		}
		b.WriteString("</tr>\n")
	}
	b.WriteString("<div class=\"wide\"><table>\n")
	row("th", t.head)
	for _, r := range t.rows {
		row("td", r)
	}
	b.WriteString("</table></div>\n")
}

func (f figure) markdown(b *strings.Builder) {
	fmt.Fprintf(b, "![%s](%s)\n\n", f.alt, path.Join(plotDir, f.file))
}

func (f figure) html(b *strings.Builder) {
	fmt.Fprintf(b, "<figure>%s</figure>\n", strings.TrimPrefix(f.svg, xmlHead))
}

var marks = regexp.MustCompile("\\*\\*(.+?)\\*\\*|`([^`]+)`")

// inline is a text as HTML.
func inline(text string) string {
	return marks.ReplaceAllStringFunc(html.EscapeString(text), func(m string) string {
		if m[0] == '`' {
			return "<code>" + m[1:len(m)-1] + "</code>"
		}
		return "<strong>" + m[2:len(m)-2] + "</strong>"
	})
}

func (d *document) markdown() string {
	var b strings.Builder
	for _, x := range d.blocks {
		x.markdown(&b)
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

const page = `<!doctype html>
<!-- SPDX-License-Identifier: Apache-2.0 -->
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Shunt: benchmarks</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #ffffff; --stripe: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117; --stripe: #151b23 } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.25; margin: 2em 0 .6em } h1 { margin-top: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top } th { color: var(--soft) }
tr:nth-child(odd) td { background: var(--stripe) } .n { text-align: right; white-space: nowrap }
figure { margin: 1.5rem 0 } figure svg { width: 100%%; height: auto } code { font-size: .9em }
</style></head><body>
%s</body></html>
`

func (d *document) html() string {
	var b strings.Builder
	heading{1, "Benchmarks"}.html(&b)
	for _, x := range d.blocks {
		x.html(&b)
	}
	return fmt.Sprintf(page, b.String())
}

// text is the document for a terminal: no plots, and tables in columns.
func (d *document) text() string {
	var b strings.Builder
	plain := func(s string) string { return strings.NewReplacer("**", "", "`", "").Replace(s) }
	for _, x := range d.blocks {
		switch x := x.(type) {
		case heading:
			fmt.Fprintf(&b, "%s\n", plain(strings.ToUpper(x.text)))
		case paragraph:
			fmt.Fprintf(&b, "%s\n\n", plain(string(x)))
		case list:
			for _, item := range x {
				fmt.Fprintf(&b, "  %s\n", plain(item))
			}
			b.WriteByte('\n')
		case *table:
			width := make([]int, len(x.head))
			all := append([][]string{x.head}, x.rows...)
			for _, r := range all {
				for i, c := range r {
					width[i] = max(width[i], utf8.RuneCountInString(plain(c)))
				}
			}
			for _, r := range all {
				var line strings.Builder
				for i, c := range r {
					c = plain(c)
					gap := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
					if i < x.texts {
						line.WriteString("  " + c + gap)
					} else {
						line.WriteString("  " + gap + c)
					}
				}
				b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
			}
			b.WriteByte('\n')
		}
	}
	return b.String()
}
