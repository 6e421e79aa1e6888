// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Foreign names the chains of others that redirect connections in a network
// namespace: another mesh's plugin, or an init container, has programmed it.
func (b *Backend) Foreign(ctx context.Context, netns string) ([]string, error) {
	n, err := openNamespace(netns)
	if err != nil {
		return nil, err
	}
	defer n.close()
	var all []string
	for _, m := range []Mode{NFT, Legacy} {
		t, err := b.ofMode(ctx, m)
		if errors.Is(err, ErrNotInstalled) {
			continue // who has no programs of a mode has none to make rules with
		}
		if err != nil {
			return nil, err
		}
		for _, f := range n.families() {
			text, err := b.run(ctx, n, "", t.save(f))
			if err != nil {
				return nil, fmt.Errorf("read the pod's %v rules: %w", f, err)
			}
			for _, chain := range redirecting(text) {
				if name := fmt.Sprintf("%v %s", f, chain); !slices.Contains(all, name) {
					all = append(all, name)
				}
			}
		}
	}
	return all, nil
}

// redirecting lists the chains in what iptables-save gives that are not ours and
// have a rule which sends connections elsewhere.
func redirecting(text string) (chains []string) {
	for line := range strings.Lines(text) {
		name, spec, ok := strings.Cut(strings.TrimPrefix(line, "-A "), " ")
		if !ok || !strings.HasPrefix(line, "-A ") || ours(name) || slices.Contains(chains, name) {
			continue
		}
		switch target(spec) {
		case "REDIRECT", "TPROXY", "DNAT":
			chains = append(chains, name)
		}
	}
	return chains
}
