// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"runtime"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
)

// builtFrom is what `shunt version` says. Its JSON is documented in docs/CLI.md.
type builtFrom struct {
	Version   string `json:"version"`
	BPFDigest string `json:"bpfDigest"`
	Go        string `json:"go"`
	Platform  string `json:"platform"`
	Kernel    string `json:"kernel"`
}

func newVersionCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "which build this is, and on which kernel it runs",
		Long: `Which build this is, and on which kernel it runs. The digest is that of the eBPF
programs: builds of one digest share the datapath that a node has loaded.`,
		Example: `  $ shunt version
  version     ...
  BPF digest  ...
  go          ...
  kernel      ...`,
	}
	output := formatFlag(cmd)
	return verb(cmd, func(cmd *cobra.Command) error {
		v := builtFrom{Version: buildVersion, BPFDigest: bpf.Digest, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
		var uts unix.Utsname
		if err := unix.Uname(&uts); err != nil {
			return fmt.Errorf("get the kernel's release: %w", err)
		}
		v.Kernel = unix.ByteSliceToString(uts.Release[:])
		return output.write(cmd.OutOrStdout(), v, func(w io.Writer) {
			columns(w, func(w io.Writer) {
				fmt.Fprintf(w, "version\t%s\nBPF digest\t%s\ngo\t%s %s\nkernel\t%s\n", v.Version, v.BPFDigest, v.Go, v.Platform, v.Kernel)
			})
		})
	})
}
