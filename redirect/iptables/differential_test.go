// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/flowgen"
	"shunt.dev/shunt/internal/testbed"
)

// Environment of the differential test.
const (
	envSeed   = "SHUNT_SEED"   // a number; the time else
	envFlows  = "SHUNT_FLOWS"  // how many flows at least, in each mode
	envPolicy = "SHUNT_POLICY" // the number of the only policy to try
)

const (
	defaultFlows   = 2400
	flowsPerPolicy = 100
)

func numberFrom(t testing.TB, env string, byDefault int64) int64 {
	t.Helper()
	s := os.Getenv(env)
	if s == "" {
		return byDefault
	}
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		t.Fatalf("%s: %v", env, err)
	}
	return n
}

// TestPrivilegedDifferential compares the kernel with Policy.Decide: random
// policies, random flows, no disagreement.
func TestPrivilegedDifferential(t *testing.T) {
	begin(t)
	seed := numberFrom(t, envSeed, time.Now().UnixNano())
	flows := int(numberFrom(t, envFlows, defaultFlows))
	only := int(numberFrom(t, envPolicy, -1))
	policies := max((flows+flowsPerPolicy-1)/flowsPerPolicy, only+1)
	t.Logf("%s=%d, %d policies of %d flows", envSeed, seed, policies, flowsPerPolicy)
	modes(t, func(t *testing.T, n *node) {
		w := testbed.NewWorld(t)
		w.ServeAll(t)
		start, tried, verdicts := time.Now(), 0, map[string]int{}
		for i := range policies {
			if only >= 0 && i != only {
				continue
			}
			ok := t.Run(fmt.Sprint("policy", i), func(t *testing.T) {
				d := flowgen.New(t, w, rand.New(rand.NewPCG(uint64(seed), uint64(i))), i, flowgen.Features{Interfaces: true, TProxy: true})
				n.apply(t, d.Pod, d.Policy)
				d.Start(t)
				trials := d.Trials(t, flowsPerPolicy)
				for k, r := range d.Run(t, trials) {
					x := trials[k]
					verdicts[fmt.Sprintf("%v %v", x.Want.Rule, x.Want.Verdict)]++
					diff := cmp.Diff(want{listener: x.Listener, dst: x.Dst, from: x.From}.outcome(r), see(r))
					if diff == "" {
						continue
					}
					if !t.Failed() {
						annots, _ := json.MarshalIndent(d.Annots, "    ", "  ")
						t.Logf("\n  repeat: %s=%d %s=%d go test ./redirect/iptables -run '^TestPrivilegedDifferential$/%s' -count=1 -v\n  pod: %v\n  annotations: %s\n  environment: %v\n  policy: %+v",
							envSeed, seed, envPolicy, i, n.opts.Mode, d.AllAddrs(), annots, d.Env, *d.Policy)
					}
					spec, _ := json.Marshal(x.Spec)
					t.Errorf("disagreement\n  flow: %+v\n  by %s (uid %d, gid %d): %s\n  Decide: %v by %v\n  outcome (-want +got):\n%s",
						x.Flow, x.Actor.Name, x.Flow.UID, x.Flow.GID, spec, x.Want.Verdict, x.Want.Rule, diff)
				}
				tried += len(trials)
			})
			if !ok && t.Failed() && i > only+3 {
				break // enough to look at
			}
		}
		t.Logf("%d flows in %v, by rule and verdict: %v", tried, time.Since(start).Round(time.Millisecond), verdicts)
		if only < 0 && tried < flows && !t.Failed() {
			t.Errorf("only %d flows were tried", tried)
		}
	})
}
