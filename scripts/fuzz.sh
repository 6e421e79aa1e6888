#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# fuzz.sh TIME: run every fuzz test of the module for TIME, such as 10s or 5m,
# one after the other. `go test -fuzz` takes one at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?usage: fuzz.sh TIME}

count=0
while IFS=: read -r file fuzz; do
  printf '== %s %s, %s\n' "${file%/*}" "$fuzz" "$time"
  # -fuzzminimizetime: an input that only adds coverage isn't worth minutes.
  go test "./${file%/*}" -run '^$' -fuzz "^$fuzz\$" -fuzztime "$time" -fuzzminimizetime 5s </dev/null
  count=$((count + 1))
done < <(grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' . | sed 's|^\./||; s|func ||' | sort)

[[ $count -gt 0 ]] || {
  echo 'fuzz: no fuzz test was found' >&2
  exit 1
}
echo "fuzz: $count fuzz tests found nothing"
