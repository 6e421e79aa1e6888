// SPDX-License-Identifier: Apache-2.0

// Command shunt-cni is the CNI plugin, as the container runtime starts it for every
// pod of the node: small, and quick for that reason. What it can't do itself, shunt
// beside it does.
package main

import "shunt.dev/shunt/internal/cni"

// buildVersion is set by the linker.
var buildVersion = "dev"

func main() { cni.MainSmall(buildVersion) }
