#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# vulncheck.sh [DB]: whether the module calls anything that is known to be
# vulnerable, by govulncheck; DB is another database than the Go project's, such
# as file:///path. Where no database can be had nothing has been checked: that is
# a failure, unless NOT_RUN names a file to say so in, as .ci/run does.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

said=$(mktemp)
trap 'rm -f "$said"' EXIT
go -C tools/vuln tool govulncheck -C ../.. ${1:+-db "$1"} ./... 2>&1 | tee "$said"
status=${PIPESTATUS[0]}
[[ $status != 0 ]] || exit 0
if [[ $status == 3 ]] || ! grep -q 'govulncheck: fetching vulnerabilities: ' "$said"; then
  echo 'vulncheck: failed: what is said above is to be mended' >&2
  exit 1
fi
why='vulncheck: NOT RUN: the vulnerability database could not be reached; name another by VULNDB'
echo "$why" >&2
[[ -n ${NOT_RUN:-} ]] || exit 1
echo "$why" >>"$NOT_RUN"
