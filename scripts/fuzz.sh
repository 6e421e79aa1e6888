#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# fuzz.sh TIME: run every fuzz test of the module for TIME, such as 10s or 5m,
# one after the other, also after one that fails. `go test -fuzz` takes one at a
# time.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?usage: fuzz.sh TIME}

output=$(mktemp)
trap 'rm -f "$output"' EXIT

# run PACKAGE TEST: in Go before 1.27, the end of -fuzztime itself may be
# reported as a failure (go.dev/issue/75804), more so where processors are busy.
# Such a run has found nothing, and is done again.
run() {
  local try
  for try in 1 2 3; do
    # -fuzzminimizetime: an input that only adds coverage isn't worth minutes.
    go test "./$1" -run '^$' -fuzz "^$2\$" -fuzztime "$time" -fuzzminimizetime 5s </dev/null 2>&1 | tee "$output" && return
    # Alone: whatever is found is said along with it.
    [[ $(sed -n '/^--- FAIL: /,/^FAIL$/p' "$output" | sed '1d; $d') == '    context deadline exceeded' ]] || return
    echo "fuzz: the end of its time was taken for a failure of $2 ($try of 3)"
  done
  return 1
}

count=0
failed=()
while IFS=: read -r file fuzz; do
  printf '== %s %s, %s\n' "${file%/*}" "$fuzz" "$time"
  run "${file%/*}" "$fuzz" || failed+=("${file%/*} $fuzz")
  count=$((count + 1))
done < <(grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' . | sed 's|^\./||; s|func ||' | sort)

[[ $count -gt 0 ]] || {
  echo 'fuzz: no fuzz test was found' >&2
  exit 1
}
if ((${#failed[@]})); then
  printf 'fuzz: %s failed\n' "${failed[@]}" >&2
  exit 1
fi
echo "fuzz: $count fuzz tests found nothing"
