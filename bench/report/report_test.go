// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/bench/programs"
)

var update = flag.Bool("update", false, "write the golden files in testdata")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("%s (-golden +got):\n%s", path, diff)
	}
}

func read(t *testing.T, text string) *samples {
	t.Helper()
	s, err := readSamples(strings.NewReader(text), "samples.txt")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// sample is the analysis of testdata: some series of each kind, and none of
// others.
func sample(t *testing.T) *analysis {
	t.Helper()
	s, err := readFile("testdata/samples.txt", readSamples)
	if err != nil {
		t.Fatal(err)
	}
	p, err := readFile("testdata/programs.txt", programs.Read)
	if err != nil {
		t.Fatal(err)
	}
	return analyse(s, p)
}

func TestGolden(t *testing.T) {
	a := sample(t)
	doc := build(a)
	golden(t, "report.md", doc.markdown())
	golden(t, "report.text", doc.text())
	var b bytes.Buffer
	if err := a.writeJSON(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "report.json", b.String())
}

// TestNothingIsLost: each series of the file is in the report, and each that a
// claim wants and the file lacks is told.
func TestNothingIsLost(t *testing.T) {
	a := sample(t)
	b := &builder{s: a.samples, told: map[*series]bool{}}
	text := build(a).markdown()
	for _, want := range []string{"`Novel/of=this`", "Not measured in this run: there are no samples of Inbound, InboundPacket."} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q", want)
		}
	}
	for i := range claims {
		for _, name := range []string{claims[i].num, claims[i].den} {
			if name != "" && a.samples.get(name, claims[i].unit) == nil && !strings.Contains(text, "`"+name+" in "+claims[i].unit+"`") {
				t.Errorf("claim %s: the report does not tell that %s is missing", claims[i].id, name)
			}
		}
	}
	b.run(nil)
	for _, x := range a.samples.series {
		if x.base() == machineBase && !b.told[x] {
			t.Errorf("%s is not told", x.name)
		}
	}
	// Of a part, what was not asked for is no news.
	part := read(t, "BenchmarkNovel 1 17 widgets\n")
	if text := build(analyse(part, programs.Table{})).text(); strings.Contains(text, "Not measured") || !strings.Contains(text, "Novel") {
		t.Errorf("of a part:\n%s", text)
	}
}

func TestBadInput(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"empty", "", "samples.txt: no samples in it"},
		{"only configuration", "goos: linux\n", "samples.txt: no samples in it"},
		{"no value", "BenchmarkX 1 5 ns/op\nBenchmarkX 1\n", "samples.txt:2: missing measurements"},
		{"no number", "BenchmarkX 1 five ns/op\n", "samples.txt:1: parsing measurement: invalid syntax"},
		{"no iterations", "\nBenchmarkX one 5 ns/op\n", "samples.txt:2: parsing iteration count: invalid syntax"},
		{"a lone value", "BenchmarkX 1 5 ns/op 6\n", "samples.txt:1: missing units"},
		{"infinite", "BenchmarkX 1 +Inf ns/op\n", "samples.txt:1: X: value +Inf ns/op, want a finite number"},
		{"two", "BenchmarkX 1 a ns/op\nBenchmarkX 1 NaN ns/op\n", "samples.txt:1: parsing measurement: invalid syntax\nsamples.txt:2: X: value NaN sec/op, want a finite number"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := readSamples(strings.NewReader(c.text), "samples.txt")
			if err == nil || err.Error() != c.want {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
}

func TestRead(t *testing.T) {
	s := read(t, "cpu: A\nrun: 1\nBenchmarkX/k=v-8 1 5 ns/op 2 B\ncpu: B\nrun: 2\nBenchmarkX/k=v 1 7 ns/op\n")
	x := s.get("X/k=v", seconds)
	if x == nil {
		t.Fatalf("no series: %+v", s.series)
	}
	if diff := cmp.Diff([]float64{5e-9, 7e-9}, x.values, cmp.Comparer(func(a, b float64) bool { return math.Abs(a-b) < 1e-15 })); diff != "" {
		t.Error(diff)
	}
	if got := x.of("2").values; len(got) != 1 || math.Abs(got[0]-7e-9) > 1e-15 {
		t.Errorf("of run 2: %v", got)
	}
	if got := s.setting("cpu"); got != "A, B" {
		t.Errorf("cpu: %q", got)
	}
	if got := noise(s); !strings.Contains(strings.Join(got, "\n"), "cpu is A and B") {
		t.Errorf("noise does not tell of two processors: %q", got)
	}
}

// rounds are about a median; the same each time.
func rounds(name string, median float64, n int) string {
	var b strings.Builder
	for i := range n {
		// Evenly within ±5 %.
		_, f := math.Modf(float64(i) * 0.618033988749895)
		fmt.Fprintf(&b, "Benchmark%s 1 %g ns/op\n", name, median*(0.95+0.1*f))
	}
	return b.String()
}

func TestRatio(t *testing.T) {
	s := read(t, rounds("A", 1000, 101)+rounds("B", 100, 101))
	r := ratio(s.get("A", seconds), p50, s.get("B", seconds), p50)
	if math.Abs(r.value-10) > 0.2 || r.lo > r.value || r.hi < r.value || r.lo < 9 || r.hi > 11 {
		t.Errorf("ratio: %+v, want about 10 and a narrow interval around it", r)
	}
	if again := ratio(s.get("A", seconds), p50, s.get("B", seconds), p50); again != r {
		t.Errorf("the second time: %+v, then %+v", r, again)
	}
	if r := ratio(s.get("A", seconds), p99, s.get("B", seconds), p50); r.value < 10.2 {
		t.Errorf("p99 by p50: %+v", r)
	}
	few := read(t, rounds("A", 1000, 5)+rounds("B", 100, 101))
	a, b := few.get("A", seconds), few.get("B", seconds)
	for _, r := range []estimate{ratio(a, p50, b, p50), ratio(b, p50, a, p50)} {
		if r.bounded() {
			t.Errorf("of five rounds: %+v, want no bounds", r)
		}
	}
}

// TestStormInterval: pods of a storm are one observation.
func TestStormInterval(t *testing.T) {
	var b strings.Builder
	for storm := range 8 {
		for range 100 {
			fmt.Fprintf(&b, "BenchmarkStorm/path=a/pods=100 1 %d ns/op\nBenchmarkOther 1 %[1]d ns/op\n", 1000+100*storm)
		}
	}
	s := read(t, b.String())
	storms, others := summarize(s.get("Storm/path=a/pods=100", seconds)).median, summarize(s.get("Other", seconds)).median
	if storms.spread() < 2*others.spread() || storms.spread() == 0 {
		t.Errorf("±%.3f by storms, ±%.3f by pods: want the first much wider", storms.spread(), others.spread())
	}
}

func TestStatistic(t *testing.T) {
	v := []float64{1, 2, 3, 4}
	for q, want := range map[statistic]float64{p50: 2.5, p90: 4, p99: 4, maximum: 4} {
		if got := q.of(v); got != want {
			t.Errorf("%s: %v, want %v", q, got, want)
		}
	}
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(i + 1)
	}
	if got := p99.of(hundred); got != 99 {
		t.Errorf("p99 of 1…100: %v", got)
	}
	// The bootstrap's quantile is the same one.
	if b := newBootstrap(hundred, 100); b.draw(p99) != 99 || b.draw(p50) != 50.5 || b.draw(maximum) != 100 {
		t.Error("one block, drawn once, is not the sample")
	}
}

func TestVerdicts(t *testing.T) {
	c := claim{id: "x", unit: seconds, num: "A", of: p50, den: "B", by: p50, bound: 1.05}
	for _, x := range []struct {
		name string
		text string
		want string
	}{
		{"well within", rounds("A", 90, 101) + rounds("B", 100, 101), "**yes**"},
		{"beyond", rounds("A", 130, 101) + rounds("B", 100, 101), "**no**"},
		{"just within", rounds("A", 104.5, 101) + rounds("B", 100, 101), "yes, but the interval reaches beyond"},
		{"just beyond", rounds("A", 105.7, 101) + rounds("B", 100, 101), "no, but the interval reaches the bound"},
		{"few", rounds("A", 90, 3) + rounds("B", 100, 3), "yes; too few rounds for an interval"},
		{"few, beyond", rounds("A", 190, 3) + rounds("B", 100, 3), "no; too few rounds for an interval"},
		{"half of it", rounds("A", 90, 3), "not measured"},
	} {
		t.Run(x.name, func(t *testing.T) {
			if v := c.judge(read(t, x.text)); v.String() != x.want {
				t.Errorf("got %s (%+v), want %s", v, v.got, x.want)
			}
		})
	}
}

func TestNoise(t *testing.T) {
	var drifting strings.Builder
	for i := range 40 {
		fmt.Fprintf(&drifting, "BenchmarkX 1 %d ns/op\n", 100+i%5+30*(i/20))
	}
	var wide strings.Builder
	for i := range 40 {
		fmt.Fprintf(&wide, "BenchmarkX 1 %d ns/op\n", 100+(i*37)%40*20)
	}
	for _, c := range []struct{ name, text, want string }{
		{"quiet", "load: 0.1\ncpus: 2\n" + rounds("X", 100, 40) + "BenchmarkMachine/during=X 1 0 steal-percent 1 others-percent\n", ""},
		{"load", "load: 1.5\ncpus: 2\n" + rounds("X", 100, 40), "busy when the run began: load 1.50 on 2 CPUs"},
		{"steal", rounds("X", 100, 40) + "BenchmarkMachine/during=X 1 9 steal-percent\n", "the host of this virtual machine took 9 % during X"},
		{"others", rounds("X", 100, 40) + "BenchmarkMachine/during=X 1 40 others-percent\n", "took 40 % during X"},
		{"drift", drifting.String(), "the median moved: `X` (time) +29 %"},
		{"wide", wide.String(), "wider than ±10 % of it: `X` (time)"},
		{"few", rounds("X", 100, 5), "Too few rounds for an interval: `X` (time)"},
		{"mixed", "commit: a\n" + rounds("X", 100, 20) + "commit: b\n" + rounds("X", 100, 20), "commit is a and b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := strings.Join(noise(read(t, c.text)), "\n")
			if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestGates(t *testing.T) {
	id := claims[0].id
	text := ""
	for run, factor := range []float64{25, 5, 24, 26, 30} { // one bad run
		text += fmt.Sprintf("run: %d\n", run+1) + rounds(claims[0].num, 100*factor, 9) + rounds(claims[0].den, 100, 9)
	}
	s := read(t, text)
	printed := read(t, "BenchmarkKernel-2 200 0 ns/op 7.998 iptables/ebpf\nBenchmarkKernel-2 200 0 ns/op 12.00 iptables/ebpf\nBenchmarkKernel-2 200 0 ns/op 7 iptables/ebpf\n")
	for _, c := range []struct{ gates, want string }{
		{"BenchmarkKernel iptables/ebpf min 7\n", ""},
		{"claim " + id + " min 20\n", ""},
		{"# both\nBenchmarkKernel iptables/ebpf max 8\nclaim " + id + " min 24\n", ""},
		{"BenchmarkKernel iptables/ebpf min 10\n", "BenchmarkKernel iptables/ebpf is 7.998, not >= 10, the median of 3 runs (7 to 12)"},
		{"claim " + id + " min 28\n", "claim " + id + " is 25, not >= 28, the median of 5 runs (5 to 30)"},
		{"BenchmarkKernel iptables/nothing min 10\n", "BenchmarkKernel iptables/nothing was not measured"},
		{"claim scale max 2\n", "claim scale was not measured: no samples of Scale/pods=1000 in sec/op, Scale/pods=1 in sec/op"},
		{"claim scale min 2\n", `gates:1: gate "claim scale min 2": claim scale has a bound from the other side, want max`},
		{"claim nothing min 2\n", `gates:1: gate "claim nothing min 2": no claim "nothing", want one of kernel-p50, `},
		{"\nBenchmarkKernel iptables/ebpf over 10\n", `gates:2: gate "BenchmarkKernel iptables/ebpf over 10": want BENCHMARK METRIC or claim ID, then min|max BOUND`},
		{"BenchmarkKernel iptables/ebpf min ten\n", `bound "ten", want a number`},
		{"# none\n", "gates: no gates in it"},
	} {
		gates, err := readGates(strings.NewReader(c.gates), "gates")
		if err == nil {
			err = judgeGates(io.Discard, gates, s, printed)
		}
		got := ""
		if err != nil {
			got = err.Error()
		}
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("gates %q: got %q, want %q", c.gates, got, c.want)
		}
	}
}

// TestClaims: each id once, and a bound that means something.
func TestClaims(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range claims {
		if seen[c.id] || c.id == "" || strings.ContainsAny(c.id, " \t") {
			t.Errorf("claim %q: want an id of its own, without spaces", c.id)
		}
		seen[c.id] = true
		if c.of == 0 || c.num == "" || c.unit == "" || (c.den == "") != (c.by == 0) {
			t.Errorf("claim %s is not whole: %+v", c.id, c)
		}
		if strings.Contains(c.unit, "ns") {
			t.Errorf("claim %s: unit %s, want benchfmt's base unit", c.id, c.unit)
		}
	}
	f, err := os.Open("../../.ci/bench-gates")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := readGates(f, "bench-gates"); err != nil {
		t.Error(err)
	}
}

func TestRun(t *testing.T) {
	dir := t.TempDir()
	docs := filepath.Join(dir, "docs")
	if err := os.MkdirAll(filepath.Join(docs, plotDir), 0o755); err != nil {
		t.Fatal(err)
	}
	md := filepath.Join(docs, "BENCHMARKS.md")
	const before, after = "# By hand\n\n", "\nAlso by hand.\n"
	if err := os.WriteFile(md, []byte(before+begin+"old\n"+end+after), 0o644); err != nil {
		t.Fatal(err)
	}
	stale := filepath.Join(docs, plotDir, "stale.svg")
	if err := os.WriteFile(stale, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	page := filepath.Join(dir, "report.html")
	o := options{samples: "testdata/samples.txt", programs: "testdata/programs.txt", docs: docs, html: page, format: "json"}
	var out bytes.Buffer
	if err := run(o, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	var parsed jsonReport
	if err := json.Unmarshal(out.Bytes(), &parsed); err != nil || !parsed.Whole {
		t.Errorf("-o json: %v, whole: %v", err, parsed.Whole)
	}
	text, err := os.ReadFile(md)
	if err != nil {
		t.Fatal(err)
	}
	if s := string(text); !strings.HasPrefix(s, before+begin) || !strings.HasSuffix(s, end+after) || strings.Contains(s, "old\n") {
		t.Errorf("what is by hand was not kept:\n%s", s)
	}
	if _, err := os.Stat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a plot that is no longer of the report: %v", err)
	}
	html, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range build(sample(t)).blocks {
		f, ok := f.(figure)
		if !ok {
			continue
		}
		file, err := os.ReadFile(filepath.Join(docs, plotDir, f.file))
		if err != nil || string(file) != f.svg {
			t.Errorf("%s: %v, or not as in the report", f.file, err)
		}
		if !bytes.Contains(html, []byte(strings.TrimPrefix(f.svg, xmlHead))) {
			t.Errorf("%s is not in the page", f.file)
		}
	}
	if strings.Contains(string(html), "<img") || strings.Contains(string(html), "<script") || strings.Contains(string(html), "<link") {
		t.Error("the page is not one file that has everything")
	}

	// A part must not be taken for the whole.
	part := filepath.Join(dir, "part.txt")
	if err := os.WriteFile(part, []byte("scope: part\nBenchmarkX 1 1 ns/op\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	o.samples = part
	if err := run(o, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "is of a part of the benchmarks") {
		t.Errorf("docs of a part: %v", err)
	}
	again, err := os.ReadFile(md)
	if err != nil || !bytes.Equal(text, again) {
		t.Errorf("docs of a part were written: %v", err)
	}
}

func TestSplice(t *testing.T) {
	for _, text := range []string{"", begin, end + begin, begin + begin + end, begin + end + end} {
		if got, err := splice(text, "new"); err == nil {
			t.Errorf("%q: got %q, want an error", text, got)
		}
	}
}

func TestFormat(t *testing.T) {
	for _, c := range []struct {
		v    float64
		unit string
		want string
	}{
		{0, seconds, "0"},
		{6.52e-4, seconds, "652 µs"},
		{9.996e-4, seconds, "1.00 ms"},
		{1.5, seconds, "1.50 s"},
		{-2e-6, seconds, "-2.00 µs"},
		{12345, "B/pod", "12.1 KiB"},
		{12, "B/pod", "12.0 B"},
		{8000, "maps-B/pod", "7.81 KiB"},
		{4.19e9, "B/s", "4.19 GB/s"},
		{2, "children/op", "2"},
		{12345, "widgets", "12,345"},
		{0.5, "widgets", "0.500"},
		{math.Inf(1), seconds, "–"},
	} {
		if got := formatValue(c.v, c.unit); got != c.want {
			t.Errorf("%v %s: got %q, want %q", c.v, c.unit, got, c.want)
		}
	}
}

// A box is where something is in a plot.
type box struct {
	what           string
	x0, y0, x1, y1 float64
}

func (a box) overlaps(b box) bool { return a.x0 < b.x1 && b.x0 < a.x1 && a.y0 < b.y1 && b.y0 < a.y1 }

// texts finds where the texts of an SVG are, by the width that the plots reckon
// with, and fails if it is no good XML or something of it lies outside.
func texts(t *testing.T, svg string) (boxes []box) {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(svg))
	var height float64
	attr := func(e xml.StartElement, name string) string {
		for _, a := range e.Attr {
			if a.Name.Local == name {
				return a.Value
			}
		}
		return ""
	}
	number := func(e xml.StartElement, name string) float64 {
		v, err := strconv.ParseFloat(attr(e, name), 64)
		if err != nil {
			t.Fatalf("<%s %s=%q>: %v", e.Name.Local, name, attr(e, name), err)
		}
		return v
	}
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return boxes
		}
		if err != nil {
			t.Fatal(err)
		}
		e, ok := token.(xml.StartElement)
		if !ok {
			continue
		}
		switch e.Name.Local {
		case "svg":
			height = number(e, "height")
		case "line":
			for _, c := range []struct {
				name string
				most float64
			}{{"x1", plotWidth}, {"x2", plotWidth}, {"y1", height}, {"y2", height}} {
				if v := number(e, c.name); v < 0 || v > c.most {
					t.Errorf("a line's %s is %v: outside", c.name, v)
				}
			}
		case "rect":
			if attr(e, "class") != "paper" && (number(e, "x") < 0 || number(e, "x")+number(e, "width") > plotWidth || number(e, "width") < 0) {
				t.Errorf("a bar from %v, %v wide: outside", number(e, "x"), number(e, "width"))
			}
		case "text":
			var content string
			x, y, anchor := number(e, "x"), number(e, "y"), attr(e, "text-anchor")
			if err := d.DecodeElement(&content, &e); err != nil {
				t.Fatal(err)
			}
			w := width(content)
			if attr(e, "class") == "title" {
				w *= 16.0 / fontSize
			}
			switch anchor {
			case "end":
				x -= w
			case "middle":
				x -= w / 2
			}
			b := box{content, x, y - 10, x + w, y + 3}
			if b.x0 < 0 || b.x1 > plotWidth || b.y0 < 0 || b.y1 > height {
				t.Errorf("%q lies outside: %+v", content, b)
			}
			for _, other := range boxes {
				if b.overlaps(other) {
					t.Errorf("%q and %q overlap", b.what, other.what)
				}
			}
			boxes = append(boxes, b)
		}
	}
}

func TestPlots(t *testing.T) {
	many := func(n int, scale float64) (v []float64) {
		for i := range n {
			v = append(v, scale*(1+float64(i)/float64(n)))
		}
		return v
	}
	long := strings.Repeat("long-", 5)
	parts := func(n int) (all []part) {
		for i := range n {
			all = append(all, part{fmt.Sprintf("step-%d", i), 1e-4 * float64(n-i)})
		}
		return all
	}
	plots := map[string]string{
		"ecdf, wide":          ecdf("T", "x", []curve{{"a", 0, many(50, 1e-6)}, {"b", 1, many(50, 100)}}),
		"ecdf, narrow":        ecdf("T", "x", []curve{{"a", 0, []float64{1e-3, 1e-3}}}),
		"ecdf, one value":     ecdf("T", "x", []curve{{"a", 0, []float64{3}}}),
		"ecdf, of zero":       ecdf("T", "x", []curve{{"a", 0, []float64{0, 1}}}),
		"ecdf, two decades":   ecdf("T", "x", []curve{{"a", 0, many(9, 9.9e-4)}, {long, 1, many(2000, 0.1)}, {"c", 2, many(3, 0.05)}}),
		"bars":                bars("T", "x", 1, []barGroup{{"group", []bar{{long, 0, estimate{1, 1, 1}, "1.00, 45.1 µs"}, {"b", 1, estimate{250, 240, 260}, "250, 11.2 ms"}}}}),
		"bars, no interval":   bars("T", "x", 0, []barGroup{{"group", []bar{{"a", 0, estimate{0.001, math.Inf(-1), math.Inf(1)}, "0.001"}}}}),
		"stack":               stack("T", "x", []string{"one", "two"}, [][]part{parts(4), parts(3)}),
		"stack, folded":       stack("T", "x", []string{long}, [][]part{fold(parts(20))}),
		"stack of nothing":    stack("T", "x", []string{"one"}, [][]part{{{"a", 0}}}),
		"special <characters": bars("<T> & \"so\"", "x<y", 1, []barGroup{{"a&b", []bar{{"<a>", 0, estimate{1, 1, 1}, "&"}}}}),
	}
	for _, b := range build(sample(t)).blocks {
		if f, ok := b.(figure); ok {
			plots[f.file] = f.svg
		}
	}
	if len(plots) < 16 {
		t.Errorf("%d plots: the report of testdata has too few", len(plots))
	}
	for name, svg := range plots {
		t.Run(name, func(t *testing.T) {
			texts(t, svg)
			if strings.Contains(svg, "NaN") || strings.Contains(svg, "Inf") {
				t.Error("a coordinate is no number")
			}
		})
	}
}

func TestFold(t *testing.T) {
	var parts []part
	for i := range 20 {
		parts = append(parts, part{fmt.Sprint(i), float64(i % 7)})
	}
	sum := func(parts []part) (s float64) {
		for _, p := range parts {
			s += p.value
		}
		return s
	}
	if got := fold(parts); len(got) > len(colours) || sum(got) != sum(parts) {
		t.Errorf("%d parts of %v in all, want at most %d of %v", len(got), sum(got), len(colours), sum(parts))
	}
	if got := fold(parts[:3]); len(got) != 3 {
		t.Errorf("few parts: %+v", got)
	}
}
