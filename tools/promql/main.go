// SPDX-License-Identifier: Apache-2.0

// Command promql takes expressions of PromQL apart, for the tests of alerts and
// dashboard: JSON strings on standard input, answers on standard output.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
)

// Answer is what an expression is made of, or why it is none.
type Answer struct {
	Error     string     `json:"error"`
	Selectors []Selector `json:"selectors"`
	Labels    []string   `json:"labels"` // that it groups and matches by
}

// Selector is one of a metric's.
type Selector struct {
	Metric   string    `json:"metric"`
	Matchers []Matcher `json:"matchers"`
}

// Matcher is a condition on a label.
type Matcher struct {
	Label string `json:"label"`
	Type  string `json:"type"` // = != =~ !~
	Value string `json:"value"`
}

func main() {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var expr string
		err := in.Decode(&expr)
		if errors.Is(err, io.EOF) {
			return
		}
		if err == nil {
			err = out.Encode(takeApart(expr))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "promql:", err)
			os.Exit(1)
		}
	}
}

func takeApart(expr string) (a Answer) {
	tree, err := parser.NewParser(parser.Options{}).ParseExpr(expr)
	if err != nil {
		a.Error = err.Error()
		return a
	}
	parser.Inspect(tree, func(n parser.Node, _ []parser.Node) error {
		switch x := n.(type) {
		case *parser.VectorSelector:
			s := Selector{Metric: x.Name}
			for _, m := range x.LabelMatchers {
				if m.Name != labels.MetricName {
					s.Matchers = append(s.Matchers, Matcher{m.Name, m.Type.String(), m.Value})
				}
			}
			a.Selectors = append(a.Selectors, s)
		case *parser.AggregateExpr:
			a.Labels = append(a.Labels, x.Grouping...)
		case *parser.BinaryExpr:
			if x.VectorMatching != nil {
				a.Labels = append(a.Labels, x.VectorMatching.MatchingLabels...)
			}
		}
		return nil
	})
	return a
}
