// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// three gives a number three significant digits, and no exponent.
func three(v float64) string {
	switch a := math.Abs(v); {
	case a == 0:
		return "0"
	case a >= 99.95:
		return group(strconv.FormatFloat(v, 'f', 0, 64))
	case a >= 9.995:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a >= 0.9995:
		return strconv.FormatFloat(v, 'f', 2, 64)
	default:
		return strconv.FormatFloat(v, 'f', 3, 64)
	}
}

// group puts commas between the thousands of a whole number.
func group(digits string) string {
	for i := len(digits) - 3; i > 0 && digits[i-1] != '-'; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

func formatRatio(v float64) string {
	if math.IsInf(v, 0) || math.IsNaN(v) {
		return "–"
	}
	return three(v)
}

// A scale makes a unit readable.
type scale struct {
	factor float64
	unit   string
}

var (
	timeScales = []scale{{1, "s"}, {1e-3, "ms"}, {1e-6, "µs"}, {1e-9, "ns"}}
	byteScales = []scale{{1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}, {1, "B"}}
	rateScales = []scale{{1e9, "GB/s"}, {1e6, "MB/s"}, {1e3, "kB/s"}, {1, "B/s"}}
)

// scalesOf are the scales of a unit, the greatest first; nil for what has none.
func scalesOf(unit string) []scale {
	what, per, _ := strings.Cut(unit, "/")
	switch {
	case strings.HasSuffix(what, "sec"):
		return timeScales
	case what == "B" && per == "s":
		return rateScales
	case what == "B" || strings.HasSuffix(what, "-B"):
		return byteScales
	}
	return nil
}

// scaleFor is the scale in which a value has a digit before its point.
func scaleFor(v float64, unit string) scale {
	scales := scalesOf(unit)
	if scales == nil {
		return scale{1, ""}
	}
	for _, s := range scales {
		if math.Abs(v) >= s.factor*0.9995 {
			return s
		}
	}
	return scales[len(scales)-1]
}

// formatValue gives a value with its unit; of a unit that is counted there is
// none to write.
func formatValue(v float64, unit string) string {
	if math.IsInf(v, 0) || math.IsNaN(v) {
		return "–"
	}
	s := scaleFor(v, unit)
	if s.unit == "" && v == math.Trunc(v) {
		return group(strconv.FormatFloat(v, 'f', 0, 64))
	}
	if v == 0 || s.unit == "" {
		return three(v)
	}
	return three(v/s.factor) + " " + s.unit
}

// unitName says in a table's head what a unit means.
func unitName(unit string) string {
	switch unit {
	case seconds:
		return "time"
	case cpuSeconds:
		return "CPU time"
	case "sec/conn":
		return "time a connection"
	case "B/s":
		return "throughput"
	case "runs/conn":
		return "runs a connection"
	}
	what, per, found := strings.Cut(unit, "/")
	if !found || per == "s" {
		return unit
	}
	if per == "op" {
		return what
	}
	if what == "B" {
		what = "memory"
	} else if of, ok := strings.CutSuffix(what, "-B"); ok {
		what = of + " memory"
	}
	return what + " a " + per
}

func capital(text string) string {
	if text == "" {
		return ""
	}
	return strings.ToUpper(text[:1]) + text[1:]
}

// formatPercent is a relative difference, with its sign.
func formatPercent(v float64) string { return fmt.Sprintf("%+.0f %%", v*100) }

// plusMinus is half an interval, relative.
func plusMinus(e estimate) string {
	if !e.bounded() {
		return "±∞"
	}
	switch s := math.Abs(e.spread()) * 100; {
	case s == 0:
		return ""
	case s < 0.95:
		return "±<1 %"
	default:
		return fmt.Sprintf("±%.0f %%", s)
	}
}
