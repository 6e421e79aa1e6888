#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# run.sh [-test.FLAG...]: the end-to-end tests, on a node for each of $MODES; of
# them those that $RUN matches. `make e2e` has built the image in bin/.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
root=$(dirname "$here")
export E2E_ROOT=$root E2E_CACHE=${E2E_CACHE:-$root/.cache/e2e} E2E_NODE E2E_MODE
# As the image was built: what all of them import is compiled once.
export CGO_ENABLED=0
: "${GO:=go}" "${MODES:=v2 hybrid containerd2}" "${VERSION:=dev}" "${RUN:=}"

# What a mode is for: all that can be done there, and of the others what differs.
declare -A select=(
  [v2]='-test.skip=^TestKubeletRestart$'
  [hybrid]='-test.run=^(TestPods|TestKubeletRestart|TestContainerdRestart)$'
  [containerd2]='-test.run=^(TestPods|TestDelete|TestShapes|TestDNS|TestHAProxy|TestFailedADD|TestContainerdRestart|TestUninstall)$'
)

began=$SECONDS
lap() { printf 'e2e: %-34s %5d s\n' "$1" $((SECONDS - began)); }

cd "$root"
# shellcheck disable=SC2086 # words
"$here/node/node.sh" build $MODES
$GO -C tools/helm build -trimpath -o "$E2E_CACHE/helm" .
# What an upgrade brings: the same but for the version.
mkdir -p "$E2E_CACHE/next"
$GO build -trimpath -ldflags "-s -w -X main.buildVersion=$VERSION-next" -o "$E2E_CACHE/next/" ./cmd/...
$GO run -trimpath ./internal/tools/image -bin "$E2E_CACHE/next" -name localhost/shunt/shunt-node:next -o "$E2E_CACHE/next.tar"
$GO test -c -trimpath -tags e2e -o "$E2E_CACHE/e2e.test" ./e2e
lap 'everything is built'

# One name for each copy of the project: they may be tested side by side.
name=shunt-e2e-$(cksum <<<"$E2E_CACHE" | cut -d' ' -f1)
for left in "$E2E_CACHE"/run/*/; do # of a run that was killed
  [[ ! -d $left ]] || "$here/node/node.sh" down "$(basename "$left")"
done
failed=()
for E2E_MODE in $MODES; do
  E2E_NODE=$name-$E2E_MODE
  trap '"$here/node/node.sh" down "$E2E_NODE"' EXIT
  "$here/node/node.sh" up "$E2E_NODE" "$E2E_MODE"
  flags=("${select[$E2E_MODE]}")
  [[ -z $RUN ]] || flags=("-test.run=$RUN")
  echo "e2e: mode $E2E_MODE: ${flags[*]}"
  # Tests wait more than they work: many at once, whatever the number of cores.
  "$here/node/node.sh" exec "$E2E_NODE" "$E2E_CACHE/e2e.test" -test.v -test.timeout 30m -test.parallel 16 "${flags[@]}" "$@" || failed+=("$E2E_MODE")
  "$here/node/node.sh" down "$E2E_NODE"
  trap - EXIT
  lap "the tests on a node in mode $E2E_MODE"
done
if ((${#failed[@]})); then
  echo "e2e: failed in mode ${failed[*]}" >&2
  exit 1
fi
