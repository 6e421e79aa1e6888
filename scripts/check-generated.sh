#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# check-generated.sh: fail unless `make generate` reproduces what is committed,
# byte for byte. What it finds on the disk it puts back.
set -euo pipefail
cd "$(dirname "$0")/.."

clang-19 --version | head -n 1
saved=$(mktemp -d)
trap 'rm -rf "$saved"' EXIT
cp -a bpf "$saved/before"
make generate
if diff -rq "$saved/before" bpf; then
  # Same as on the disk. Is that also what is committed?
  if [[ -n $(git status --porcelain -- bpf) ]]; then
    git --no-pager status --short -- bpf
    [[ ${CI:-} != true ]] || {
      echo 'check-generated: bpf/ differs from what is committed' >&2
      exit 1
    }
    echo 'check-generated: bpf/ has changes that are not committed; make generate adds none'
  fi
  echo 'check-generated: what is generated is what is there'
  exit
fi
git --no-pager diff --stat -- bpf || true
rm -rf bpf
cp -a "$saved/before" bpf
echo 'check-generated: bpf/ is not what make generate makes of it: run that, and commit the outcome' >&2
exit 1
