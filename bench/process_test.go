// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"shunt.dev/shunt/internal/testbed"
)

// BenchmarkAddProcess compares, turn by turn, ADD as a process, from exec to
// exit, without the node agent and with it, with the reference: a static binary
// that does one GET of the same pod from the same API server and prints
// prevResult. Every turn has a fresh pod, and every other turn begins with the
// agent.
func BenchmarkAddProcess(b *testing.B) {
	testbed.Privileged(b)
	w := testbed.NewWorld(b)
	api := testbed.NewAPIServer(b)
	cni := testbed.NewCNI(b)
	cni.RunDir = tmpfs(b)
	dir := b.TempDir()
	cni.Kubeconfig = api.WriteKubeconfig(b, dir)
	reference, err := testbed.BuildCommand("shunt.dev/shunt/bench/reference", false)
	if err != nil {
		b.Fatal(err)
	}
	ca := filepath.Join(dir, "ca.crt")
	if err := os.WriteFile(ca, api.CA(), 0o600); err != nil {
		b.Fatal(err)
	}
	kubeconfig, err := os.ReadFile(cni.Kubeconfig)
	if err != nil {
		b.Fatal(err)
	}
	// As the node agent writes it.
	kubeconfigJSON, err := yaml.YAMLToJSON(kubeconfig)
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(cni.Kubeconfig, kubeconfigJSON, 0o600); err != nil {
		b.Fatal(err)
	}
	agent := newAgent(b, cni.RunDir)
	token := regexp.MustCompile(`token: "(.*)"`).FindSubmatch(kubeconfig)[1]

	steps := map[string]samples{}
	add := func(step string, d time.Duration) { steps[step] = append(steps[step], d) }
	newPod := func() *testbed.Pod {
		p := testbed.NewPod(b, testbed.InWorld(w))
		api.SetPod(b, p.Namespace, p.Name, p.Injected())
		agent.set(b, p)
		return p
	}
	cni.MustAdd(b, newPod()) // stays, as on a node in use
	turns := 0
	turn := func() {
		turns++
		p := newPod()
		url := fmt.Sprintf("%s/api/v1/namespaces/%s/pods/%s", api.URL(), p.Namespace, p.Name)
		cmd := exec.Command(reference, url, ca, string(token))
		conf, err := json.Marshal(map[string]any{"prevResult": p.PrevResult("1.1.0")})
		if err != nil {
			b.Fatal(err)
		}
		cmd.Stdin = bytes.NewReader(conf)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		start := time.Now()
		err = cmd.Run()
		add("reference", time.Since(start))
		if err != nil {
			b.Fatalf("reference: %v: %s", err, out.Bytes())
		}
		add("reference-cpu", cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime())
		without := func() {
			agent.hide(b)
			r := cni.MustAdd(b, p)
			agent.show(b)
			add("ADD", r.Elapsed)
			add("ADD-cpu", r.CPU)
			add("DEL", cni.MustDel(b, p).Elapsed)
		}
		with := func() {
			r := cni.MustAdd(b, p, testbed.Set("kubeconfig", "/none/such"))
			add("ADD-agent", r.Elapsed)
			add("ADD-agent-cpu", r.CPU)
			cni.MustDel(b, p)
		}
		if turns%2 == 0 {
			with()
			without()
		} else {
			without()
			with()
		}
		add("ADD-excluded", cni.MustAdd(b, p, testbed.Set("excludeNamespaces", []string{p.Namespace})).Elapsed)
		p.Destroy(b)
	}
	turn()
	clear(steps)
	for b.Loop() {
		turn()
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(steps["ADD"].median())/float64(steps["reference"].median()), "ADD/reference")
	b.ReportMetric(float64(steps["ADD-agent"].median())/float64(steps["ADD"].median()), "ADD-agent/ADD")
	b.ReportMetric(float64(steps["ADD-agent-cpu"].median())/float64(steps["ADD-cpu"].median()), "ADD-agent-cpu/ADD-cpu")
	for name, s := range steps {
		b.ReportMetric(float64(s.median().Microseconds()), name+"-µs")
	}
}
