// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"io"
	"math"
)

// jsonReport is what -o json writes. Units are benchfmt's base units: seconds
// and bytes. A number that there is none of is null.
type jsonReport struct {
	Whole  bool                `json:"whole"` // every benchmark ran
	Config map[string][]string `json:"config"`
	Noise  []string            `json:"noise"`
	Claims []jsonClaim         `json:"claims"`
	Series []jsonSeries        `json:"series"`
}

type jsonClaim struct {
	ID          string   `json:"id"`
	What        string   `json:"what"`
	Unit        string   `json:"unit"` // of the series; the value has it if there is no denominator
	Numerator   string   `json:"numerator"`
	Denominator string   `json:"denominator,omitempty"`
	Statistic   string   `json:"statistic"`
	AtLeast     bool     `json:"atLeast"`
	Bound       float64  `json:"bound"`
	Value       *float64 `json:"value"`
	Lo          *float64 `json:"lo"`
	Hi          *float64 `json:"hi"`
	Reached     bool     `json:"reached"`
	Sure        bool     `json:"sure"`
	Missing     []string `json:"missing,omitempty"`
}

type jsonSeries struct {
	Name   string   `json:"name"`
	Unit   string   `json:"unit"`
	N      int      `json:"n"`
	Median *float64 `json:"median"`
	Lo     *float64 `json:"lo"`
	Hi     *float64 `json:"hi"`
	P90    float64  `json:"p90"`
	P99    float64  `json:"p99"`
	Max    float64  `json:"max"`
}

func finite(v float64) *float64 {
	if math.IsInf(v, 0) || math.IsNaN(v) {
		return nil
	}
	return &v
}

func (a *analysis) writeJSON(w io.Writer) error {
	out := jsonReport{Whole: a.whole, Config: map[string][]string{}, Noise: a.noise, Claims: []jsonClaim{}, Series: []jsonSeries{}}
	if out.Noise == nil {
		out.Noise = []string{}
	}
	for _, c := range a.samples.config {
		out.Config[c.key] = c.values
	}
	for _, v := range a.verdicts {
		c := jsonClaim{
			ID: v.id, What: v.what, Unit: v.unit, Numerator: v.num, Denominator: v.den, Statistic: v.statistic(),
			AtLeast: v.atLeast, Bound: v.bound, Reached: v.reached, Sure: v.sure, Missing: v.missing,
		}
		if len(v.missing) == 0 {
			c.Value, c.Lo, c.Hi = finite(v.got.value), finite(v.got.lo), finite(v.got.hi)
		}
		out.Claims = append(out.Claims, c)
	}
	for _, x := range a.samples.series {
		s := summarize(x)
		out.Series = append(out.Series, jsonSeries{
			x.name, x.unit, s.n, finite(s.median.value), finite(s.median.lo), finite(s.median.hi), s.p90, s.p99, s.max,
		})
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(out)
}
