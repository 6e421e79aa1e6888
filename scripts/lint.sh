#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# lint.sh: every check of the source that runs none of it. All of them run, and
# the script fails if one did.
#
# No pipefail: a search that finds nothing is what most of these want, and the
# last command of each pipeline judges.
set -u
cd "$(dirname "$0")/.." || exit

failed=()
# check NAME COMMAND...: a check is good when the command succeeds.
check() {
  local name=$1
  shift
  if "$@"; then printf 'ok    %s\n' "$name"; else
    printf 'FAIL  %s\n' "$name"
    failed+=("$name")
  fi
}

# none MESSAGE: reads findings, and is good when there are none.
none() {
  local found
  found=$(cat)
  [[ -z $found ]] || {
    printf '%s\n' "$found" | sed 's/^/  /'
    echo "  ^ $1"
    return 1
  }
}

# files lists what belongs to the project, the files that are new included.
files() { git ls-files --cached --others --exclude-standard -z -- "$@" | existing; }
existing() { while IFS= read -rd '' f; do [[ -f $f ]] && printf '%s\0' "$f"; done; }

spdx() {
  local f
  while IFS= read -rd '' f; do
    case $f in
      *_bpfel.go) continue ;; # generated
      *.go) head -n 5 "$f" | grep -qE 'SPDX-License-Identifier: Apache-2\.0' || echo "$f" ;;
      *.c | *.h) head -n 5 "$f" | grep -qF 'SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause' || echo "$f" ;;
      *) head -n 5 "$f" | grep -qE 'SPDX-License-Identifier: ' || echo "$f" ;;
    esac
  done < <(files '*.go' '*.c' '*.h' '*.sh' '*.yaml' '*.yml' Makefile .ci/run) | none 'no SPDX line, or the wrong licence, in the first five lines'
}

shell() {
  local -a scripts
  mapfile -d '' scripts < <(files '*.sh' .ci/run)
  local f bad=0
  for f in "${scripts[@]}"; do bash -n "$f" || bad=1; done
  shellcheck "${scripts[@]}" && return "$bad"
}

# Registries and paths of the machine are asked of the machine that this runs
# on, so that this file does not name them either.
places() {
  local -a words=()
  local word
  while read -r word; do
    word=${word#*://}
    word=${word#*@}
    word=${word%%/*}
    [[ $word == *.* ]] && words+=("${word//./\\.}")
  done < <(
    {
      go env GOPROXY GOSUMDB | tr ',| ' '\n'
      command -v apt-get >/dev/null && LC_ALL=C apt-cache policy | grep -oE 'https?://[^ ]+'
      command -v npm >/dev/null && npm config get registry
    } 2>/dev/null | sort -u
  )
  [[ ${#words[@]} -gt 0 ]] || {
    echo 'no registry to look for: is go missing?'
    return 1
  }
  # Folders of the root that no distribution has there.
  while read -r word; do
    words+=("(^|[^[:alnum:]_.)}/-])/$word/")
  done < <(find / -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | grep -vxE \
    'bin|boot|dev|etc|home|lib.*|media|mnt|opt|proc|root|run|s?bin|srv|sys|tmp|usr|var|lost\+found|snap|\..*')
  local -a args=()
  for word in "${words[@]}"; do args+=(-e "$word"); done
  files . | xargs -0 grep -nIE "${args[@]}" /dev/null | none 'names a registry, or a path of one machine'
}

# What the house style forbids and no linter looks for.
style() {
  files '*.go' | xargs -0 grep -nE 'Contains\([a-z]*[eE]rr\.Error\(\)' /dev/null | grep -v _test.go |
    none 'decide by errors.Is or errors.As, not by the text of an error'
}

tidy() {
  local dir
  for dir in . tools tools/helm tools/promql tools/vuln e2e/node/hyper e2e/node/containerd; do go -C "$dir" mod tidy -diff || return; done
}

# Modules of their own are left out by ./...
vet() { go vet -tags e2e ./... && go -C tools/helm vet ./... && go -C tools/promql vet ./...; }
format() { files '*.go' | xargs -0 gofmt -l -s | none 'gofmt'; }

# git answers for a tree that another user owns only when told that it may.
git rev-parse --is-inside-work-tree >/dev/null || exit 1

check gofmt format
check 'go vet' vet
check golangci-lint go tool -modfile=tools/go.mod golangci-lint run
check 'go mod tidy' tidy
check 'shell scripts' shell
check 'SPDX headers' spdx
check 'names of registries and machines' places
check 'house style' style

if ((${#failed[@]})); then
  printf 'lint: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
