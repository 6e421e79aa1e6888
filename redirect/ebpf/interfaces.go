// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"fmt"
	"slices"
	"strings"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/loader"
)

// lo is in every network namespace.
const lo = "lo"

// exclude has the programs exclude interfaces, by their names. The hooks that see
// a connection leave don't know by which interface: it is certain where the pod has
// one besides lo. list gives those; of several, one that alone is up counts, because
// modules for tunnels leave some, down, in every network namespace.
//
// It fails with loader.ErrInterfaces where that is not so.
func exclude(r *loader.Rules, names []string, list func() ([]loader.Interface, error)) error {
	if len(names) == 0 {
		return nil
	}
	all, err := list()
	if err != nil {
		return err
	}
	there := nameList(all)
	for _, name := range names {
		if name != lo && !slices.ContainsFunc(all, func(i loader.Interface) bool { return i.Name == name }) {
			return fmt.Errorf("%w: excludeInterfaces: the pod has no %s as yet, but %s: eBPF excludes what is there when the pod is set up",
				loader.ErrInterfaces, name, there)
		}
	}
	if len(all) > 1 {
		all = slices.DeleteFunc(all, func(i loader.Interface) bool { return !i.Up })
	}
	if len(all) != 1 {
		return fmt.Errorf("%w: excludeInterfaces: the pod has %s besides lo: eBPF can tell by which one a connection leaves only if there is one that is up",
			loader.ErrInterfaces, there)
	}
	r.Interface = all[0].Name
	for _, name := range names {
		switch name {
		case lo:
			r.Flags |= bpf.ShuntPodFlagPOD_EXCLUDE_LO
		case r.Interface:
			r.Flags |= bpf.ShuntPodFlagPOD_EXCLUDE_IF
		default:
			return fmt.Errorf("%w: excludeInterfaces: %s is down", loader.ErrInterfaces, name)
		}
	}
	return nil
}

func nameList(all []loader.Interface) string {
	if len(all) == 0 {
		return "none"
	}
	var names []string
	for _, i := range all {
		names = append(names, i.Name)
	}
	return strings.Join(names, ", ")
}
