// SPDX-License-Identifier: Apache-2.0

// Command helm is as much of Helm as the tests of the chart need: its engine,
// its schema validation and its lint, without the client of a cluster. It
// takes a third of the time to build that the whole of Helm takes.
//
//	helm lint CHART      as `helm lint --strict` does; exit 1 with findings
//	helm render CHART    as `helm template` does, once for each request: JSON
//	                     objects on standard input, answers on standard output
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	"helm.sh/helm/v3/pkg/releaseutil"
)

// defaultKube is rendered for where a request names no version of Kubernetes.
// (Helm's own default is set by its linker flags, and 1.20 without them.)
const defaultKube = "v1.35.0"

// Request asks for one rendering.
type Request struct {
	Release     string         `json:"release"`
	Namespace   string         `json:"namespace"`
	KubeVersion string         `json:"kubeVersion"`
	Values      map[string]any `json:"values"`
}

// Answer is the rendering, or why there is none.
type Answer struct {
	Manifest string `json:"manifest"`
	Notes    string `json:"notes"`
	Error    string `json:"error"`
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: helm lint|render CHART")
		os.Exit(2)
	}
	var err error
	switch verb, dir := os.Args[1], os.Args[2]; verb {
	case "lint":
		err = lintChart(dir)
	case "render":
		err = serve(dir, os.Stdin, os.Stdout)
	default:
		err = fmt.Errorf("%q is not a verb: expected lint or render", verb)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "helm:", err)
		os.Exit(1)
	}
}

func lintChart(dir string) error {
	var found []error
	for _, m := range lint.All(dir, nil, "kube-system", true).Messages {
		if m.Severity > support.InfoSev {
			found = append(found, m)
		}
	}
	return errors.Join(found...)
}

func serve(dir string, r io.Reader, w io.Writer) error {
	in, out := json.NewDecoder(r), json.NewEncoder(w)
	in.DisallowUnknownFields()
	for {
		var req Request
		if err := in.Decode(&req); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("decode a request: %w", err)
		}
		c, err := loader.Load(dir) // anew: rendering changes a chart's values
		if err != nil {
			return fmt.Errorf("load the chart: %w", err)
		}
		answer, err := render(c, req)
		if err != nil {
			answer.Error = err.Error()
		}
		if err := out.Encode(answer); err != nil {
			return fmt.Errorf("encode an answer: %w", err)
		}
	}
}

func render(c *chart.Chart, req Request) (Answer, error) {
	caps := chartutil.DefaultCapabilities.Copy()
	v, err := chartutil.ParseKubeVersion(cmp.Or(req.KubeVersion, defaultKube))
	if err != nil {
		return Answer{}, fmt.Errorf("parse the version of Kubernetes: %w", err)
	}
	caps.KubeVersion = *v
	if want := c.Metadata.KubeVersion; !chartutil.IsCompatibleRange(want, caps.KubeVersion.String()) {
		return Answer{}, fmt.Errorf("chart requires kubeVersion: %s which is incompatible with Kubernetes %s", want, caps.KubeVersion.String())
	}
	release := chartutil.ReleaseOptions{Name: req.Release, Namespace: req.Namespace, Revision: 1, IsInstall: true}
	values, err := chartutil.ToRenderValues(c, req.Values, release, caps)
	if err != nil {
		return Answer{}, err
	}
	files, err := engine.Engine{Strict: true}.Render(c, values)
	if err != nil {
		return Answer{}, err
	}
	var answer Answer
	for name, text := range files {
		if path.Base(name) == "NOTES.txt" {
			answer.Notes = text
			delete(files, name)
		}
	}
	hooks, manifests, err := releaseutil.SortManifests(files, nil, releaseutil.InstallOrder)
	if err != nil {
		return Answer{}, err
	}
	if len(hooks) != 0 {
		return Answer{}, errors.New("the chart has hooks, and this program knows none")
	}
	var b strings.Builder
	for _, m := range manifests {
		fmt.Fprintf(&b, "---\n%s\n", strings.TrimSpace(m.Content))
	}
	answer.Manifest = b.String()
	return answer, nil
}
