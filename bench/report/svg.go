// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strconv"
	"strings"
)

const (
	plotWidth = 860
	fontSize  = 13
	// charWidth is what a character takes, in pixels, of the widest fonts that
	// are used: what is placed by it does not overlap.
	charWidth = 7.4

	xmlHead = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!-- SPDX-License-Identifier: Apache-2.0; written by bench/report -->\n"
)

// colours are told apart in light and dark, and by the colour-blind.
var colours = []struct{ light, dark string }{
	{"#0969da", "#58a6ff"}, // blue
	{"#c4500a", "#f0883e"}, // orange
	{"#1a7f37", "#56d364"}, // green
	{"#8250df", "#bc8cff"}, // purple
	{"#59636e", "#9198a1"}, // grey
	{"#9a6700", "#e3b341"}, // yellow
	{"#bf3989", "#ff7bb9"}, // pink
	{"#087f8c", "#39c5cf"}, // cyan
	{"#1f2328", "#f0f6fc"}, // ink
}

// colourOf lets a path have the same colour in every plot.
var colourOf = map[string]int{
	"ebpf-sk_lookup": 0, "ebpf-tc": 7, "iptables-nft": 1, "iptables-legacy": 3,
	"null": 4, "plain": 4, "reference": 5, "not-in-mesh": 2, "outside": 2, "excluded": 6, "ebpf-empty": 6, "direct": 8,
}

func colour(path string, i int) int {
	if c, ok := colourOf[path]; ok {
		return c
	}
	return i % len(colours)
}

// style is every plot's: the reader's own preference decides between light and
// dark, and paper behind the ink keeps it legible where the page does not know.
var style = func() string {
	var b strings.Builder
	b.WriteString("text{font:13px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;fill:#1f2328;paint-order:stroke;stroke:#ffffff;stroke-width:4px;stroke-linejoin:round}" +
		".title{font-size:16px;font-weight:600}.soft{fill:#59636e}.paper{fill:#ffffff}" +
		".grid{stroke:#d1d9e0;stroke-width:1}.axis{stroke:#59636e;stroke-width:1}.whisker{stroke:#1f2328;stroke-width:1.5}" +
		".line{fill:none;stroke-width:2.25;stroke-linejoin:round}")
	for i, c := range colours {
		fmt.Fprintf(&b, ".f%d{fill:%s}.s%d{stroke:%s}", i, c.light, i, c.light)
	}
	b.WriteString("@media(prefers-color-scheme:dark){text{fill:#e6edf3;stroke:#0d1117}.soft{fill:#9198a1}.paper{fill:#0d1117}" +
		".grid{stroke:#2a313c}.axis{stroke:#9198a1}.whisker{stroke:#e6edf3}")
	for i, c := range colours {
		fmt.Fprintf(&b, ".f%d{fill:%s}.s%d{stroke:%s}", i, c.dark, i, c.dark)
	}
	b.WriteString("}")
	return b.String()
}()

// A canvas is an SVG that is being drawn, in pixels from the top left.
type canvas struct {
	strings.Builder
	height float64
	title  string
}

func newCanvas(title string, height float64) *canvas {
	c := &canvas{height: height, title: title}
	c.text(16, 26, "title", "start", title)
	return c
}

// num writes a coordinate with no more digits than are seen.
func num(v float64) string { return strconv.FormatFloat(math.Round(v*10)/10, 'f', -1, 64) }

func (c *canvas) text(x, y float64, class, anchor, text string) {
	fmt.Fprintf(c, "<text x=\"%s\" y=\"%s\" class=\"%s\" text-anchor=\"%s\">%s</text>\n", num(x), num(y), class, anchor, html.EscapeString(text))
}

func (c *canvas) line(x1, y1, x2, y2 float64, class string) {
	fmt.Fprintf(c, "<line x1=\"%s\" y1=\"%s\" x2=\"%s\" y2=\"%s\" class=\"%s\"/>\n", num(x1), num(y1), num(x2), num(y2), class)
}

func (c *canvas) rect(x, y, w, h float64, class, tip string) {
	fmt.Fprintf(c, "<rect x=\"%s\" y=\"%s\" width=\"%s\" height=\"%s\" class=\"%s\"><title>%s</title></rect>\n",
		num(x), num(y), num(w), num(h), class, html.EscapeString(tip))
}

func (c *canvas) String() string {
	return fmt.Sprintf("%s<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %s\" width=\"%d\" height=\"%s\" role=\"img\" aria-label=\"%s\">\n"+
		"<style>%s</style>\n<rect class=\"paper\" width=\"100%%\" height=\"100%%\" rx=\"6\"/>\n%s</svg>\n",
		xmlHead, plotWidth, num(c.height), plotWidth, num(c.height), html.EscapeString(c.title), style, c.Builder.String())
}

// An axis maps values to pixels.
type axis struct {
	lo, hi   float64 // values
	from, to float64 // pixels
	log      bool
	ticks    []float64
}

func (a axis) at(v float64) float64 {
	lo, hi := a.lo, a.hi
	if a.log {
		lo, hi, v = math.Log(lo), math.Log(hi), math.Log(v)
	}
	return a.from + (v-lo)/(hi-lo)*(a.to-a.from)
}

// logAxis has a tick at 1, 2 and 5 times each power of ten, or fewer where they
// would be too near.
func logAxis(lo, hi, from, to float64) axis {
	if hi < lo*2 {
		lo, hi = lo/math.Sqrt2, hi*math.Sqrt2
	}
	lo, hi = lo*0.95, hi*1.05
	a := axis{lo: lo, hi: hi, from: from, to: to, log: true}
	decades := math.Log10(hi / lo)
	steps := []float64{1, 2, 5}
	if decades*3*64 > to-from {
		steps = []float64{1}
	}
	for e := math.Floor(math.Log10(lo)); e <= math.Ceil(math.Log10(hi)); e++ {
		for _, s := range steps {
			if v := s * math.Pow(10, e); v >= lo && v <= hi {
				a.ticks = append(a.ticks, v)
			}
		}
	}
	return a
}

// linearAxis starts at zero, and has four to eight round ticks.
func linearAxis(hi, from, to float64) axis {
	if hi <= 0 {
		hi = 1
	}
	step := math.Pow(10, math.Floor(math.Log10(hi)))
	for _, f := range []float64{0.2, 0.25, 0.5, 1} {
		if hi/(step*f) <= 7 {
			step *= f
			break
		}
	}
	a := axis{hi: hi * 1.02, from: from, to: to}
	for i := 0; float64(i)*step <= a.hi; i++ {
		a.ticks = append(a.ticks, float64(i)*step)
	}
	return a
}

// tick is a tick's label: no more digits than it needs.
func tick(v float64, unit string) string {
	if v == 0 {
		return "0"
	}
	s := scaleFor(v, unit)
	label := strconv.FormatFloat(v/s.factor, 'g', 4, 64)
	if s.unit != "" {
		label += " " + s.unit
	}
	return label
}

// xAxis draws the grid, the ticks and what the axis is.
func (c *canvas) xAxis(a axis, top, bottom float64, label func(float64) string, name string) {
	for _, v := range a.ticks {
		x := a.at(v)
		c.line(x, top, x, bottom, "grid")
		c.text(x, bottom+18, "soft", "middle", label(v))
	}
	c.line(a.from, bottom, a.to, bottom, "axis")
	c.text((a.from+a.to)/2, bottom+40, "soft", "middle", name)
}

// dashes tell lines apart without colour; each colour has its own.
var dashes = []string{"", "7 4", "3 3", "10 3 3 3", "1 2"}

// A curve of an ECDF.
type curve struct {
	name   string
	colour int
	values []float64
}

// ecdf plots how many of the times are not above each time, on a logarithmic axis.
// The legend has each curve's median.
func ecdf(title, xName string, curves []curve) string {
	const left, top, plot, right = 64, 48, 280, 24
	legendTop := float64(top + plot + 66)
	c := newCanvas(title, legendTop+float64((len(curves)+1)/2)*22+6)
	lo, hi := math.Inf(1), math.Inf(-1)
	for _, k := range curves {
		lo, hi = min(lo, slices.Min(k.values)), max(hi, slices.Max(k.values))
	}
	if lo <= 0 { // a time too short for its clock
		lo = hi / 1e6
	}
	x := logAxis(lo, hi, left, plotWidth-right)
	y := axis{hi: 1, from: top + plot, to: top}
	for _, v := range []float64{0, 0.25, 0.5, 0.75, 1} {
		c.line(left, y.at(v), plotWidth-right, y.at(v), "grid")
		c.text(left-8, y.at(v)+4, "soft", "end", fmt.Sprintf("%g %%", v*100))
	}
	c.xAxis(x, top, top+plot, func(v float64) string { return tick(v, seconds) }, xName)
	for i, k := range curves {
		sorted := slices.Sorted(slices.Values(k.values))
		var d strings.Builder
		// More steps than pixels are not seen.
		n := len(sorted)
		step := max(n/600, 1)
		fmt.Fprintf(&d, "M%s,%s", num(x.at(max(sorted[0], lo))), num(y.at(0)))
		for j := 0; j < n; j += step {
			fmt.Fprintf(&d, "V%sH%s", num(y.at(float64(j)/float64(n))), num(x.at(max(sorted[j], lo))))
		}
		fmt.Fprintf(&d, "H%sV%s", num(x.at(sorted[n-1])), num(y.at(1)))
		dash := dashes[k.colour%len(dashes)]
		fmt.Fprintf(c, "<path d=\"%s\" class=\"line s%d\" stroke-dasharray=\"%s\"><title>%s</title></path>\n", d.String(), k.colour, dash, html.EscapeString(k.name))
		lx, ly := float64(left+(i%2)*(plotWidth-left-right)/2), legendTop+float64(i/2)*22
		fmt.Fprintf(c, "<path d=\"M%s,%sh30\" class=\"line s%d\" stroke-dasharray=\"%s\"/>\n", num(lx), num(ly-4), k.colour, dash)
		c.text(lx+38, ly, "", "start", fmt.Sprintf("%s, median %s", k.name, formatValue(p50.of(sorted), seconds)))
	}
	return c.String()
}

// A bar is a value with its interval.
type bar struct {
	name   string
	colour int
	value  estimate
	label  string // what is written behind it
}

// A group of bars has a name of its own.
type barGroup struct {
	name string
	bars []bar
}

// bars plots groups of horizontal bars with their intervals; at mark, if it is
// not 0, is a line that they are compared with.
func bars(title, xName string, mark float64, groups []barGroup) string {
	const top, barHeight, gap, groupHead = 48.0, 20.0, 6.0, 26.0
	left, right, rows, hi := 0.0, 0.0, 0.0, mark
	for _, g := range groups {
		rows += groupHead + gap
		for _, b := range g.bars {
			left = max(left, width(b.name))
			right = max(right, width(b.label))
			hi = max(hi, b.value.value)
			if b.value.bounded() {
				hi = max(hi, b.value.hi)
			}
			rows += barHeight + gap
		}
	}
	left, right = left+28, right+24
	c := newCanvas(title, top+rows+56)
	x := linearAxis(hi, left, plotWidth-right)
	c.xAxis(x, top, top+rows, func(v float64) string { return tick(v, "") }, xName)
	if mark != 0 {
		c.line(x.at(mark), top, x.at(mark), top+rows, "axis")
	}
	at := float64(top)
	for _, g := range groups {
		c.text(16, at+18, "", "start", g.name)
		at += groupHead
		for _, b := range g.bars {
			c.text(left-8, at+barHeight-5, "soft", "end", b.name)
			c.rect(left, at, x.at(b.value.value)-left, barHeight, fmt.Sprintf("f%d", b.colour), b.name+": "+b.label)
			end := x.at(b.value.value)
			if b.value.bounded() && b.value.hi > b.value.lo {
				middle := at + barHeight/2
				l, r := x.at(max(b.value.lo, 0)), x.at(b.value.hi)
				c.line(l, middle, r, middle, "whisker")
				c.line(l, middle-4, l, middle+4, "whisker")
				c.line(r, middle-4, r, middle+4, "whisker")
				end = max(end, r)
			}
			c.text(end+8, at+barHeight-5, "", "start", b.label)
			at += barHeight + gap
		}
		at += gap
	}
	return c.String()
}

// A part of a stacked bar.
type part struct {
	name  string
	value float64
}

// stack plots stacked bars of times, one for each row, and a legend of all parts.
func stack(title, xName string, names []string, rows [][]part) string {
	const top, barHeight, gap = 48, 34, 14
	left := 0.0
	for _, n := range names {
		left = max(left, width(n))
	}
	left += 28
	hi := 0.0
	for _, r := range rows {
		sum := 0.0
		for _, p := range r {
			sum += p.value
		}
		hi = max(hi, sum)
	}
	plot := float64(len(rows))*(barHeight+gap) + gap
	type entry struct {
		text   string
		colour int
	}
	var legend []entry
	next := 0
	for i, r := range rows {
		for _, p := range r {
			text := fmt.Sprintf("%s, %s", p.name, formatValue(p.value, seconds))
			if len(rows) > 1 {
				text = names[i] + ": " + text
			}
			legend = append(legend, entry{text, next % len(colours)})
			next++
		}
	}
	legendTop := top + plot + 66
	c := newCanvas(title, legendTop+float64((len(legend)+1)/2)*22+6)
	x := linearAxis(hi, left, plotWidth-40)
	c.xAxis(x, top, top+plot, func(v float64) string { return tick(v, seconds) }, xName)
	next = 0
	for i, r := range rows {
		y := top + gap + float64(i)*(barHeight+gap)
		c.text(left-8, y+barHeight/2+5, "soft", "end", names[i])
		sum := 0.0
		for _, p := range r {
			from, to := x.at(sum), x.at(sum+p.value)
			// A seam of paper keeps neighbours apart.
			c.rect(from, y, max(to-from-1, 0.5), barHeight, fmt.Sprintf("f%d", next%len(colours)), p.name+": "+formatValue(p.value, seconds))
			sum += p.value
			next++
		}
	}
	for i, e := range legend {
		lx, ly := 16+float64(i%2)*(plotWidth-32)/2, legendTop+float64(i/2)*22
		c.rect(lx, ly-11, 13, 13, fmt.Sprintf("f%d", e.colour), e.text)
		c.text(lx+20, ly, "", "start", e.text)
	}
	return c.String()
}

func width(text string) float64 { return float64(len([]rune(text))) * charWidth }
