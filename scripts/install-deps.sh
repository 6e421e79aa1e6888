#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# install-deps.sh SET...: install, from the distribution's own packages, what
# is missing of the sets build, demo, image, test, e2e, kernels, lint and generate. For
# Debian 12 and 13, Ubuntu 22.04 and 24.04. Where nothing is missing it changes nothing
# and needs no root.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

# What is needed, as package=what shows that it is there: a command, or a file.
# shellcheck disable=SC2034 # read by name, in missing
{
  build=(ca-certificates=/etc/ssl/certs/ca-certificates.crt)
  demo=("${build[@]}")
  image=("${build[@]}" iptables=iptables-restore)
  test=("${build[@]}" gcc=gcc libc6-dev=/usr/include/stdlib.h
    iptables=iptables-restore iproute2=ip haproxy=haproxy redsocks=redsocks
    squid=squid shadowsocks-libev=ss-redir)
  e2e=("${image[@]}" containerd=containerd runc=runc containernetworking-plugins=/usr/lib/cni/bridge haproxy=haproxy
    iproute2=ip curl=curl openssl=openssl procps=sysctl util-linux=nsenter)
  kernels=("${build[@]}" qemu-system-x86=qemu-system-x86_64 busybox-static=busybox iptables=iptables-restore
    nftables=nft iproute2=ip xz-utils=xz zstd=zstd debian-archive-keyring=/usr/share/keyrings/debian-archive-keyring.gpg)
  lint=("${build[@]}" git=git shellcheck=shellcheck)
  generate=("${build[@]}" git=git clang-19=clang-19 llvm-19=llvm-strip-19
    libbpf-dev=/usr/include/bpf/bpf_helpers.h linux-libc-dev=/usr/include/linux/bpf.h)
}

die() {
  printf 'install-deps: %s\n' "$@" >&2
  exit 1
}

# missing SET prints the packages of a set that are not there.
missing() {
  local -n set=$1
  local entry have
  for entry in "${set[@]}"; do
    have=${entry#*=}
    case $have in
      /*) [[ -e $have ]] ;;
      *) command -v "$have" >/dev/null ;;
    esac || echo "${entry%%=*}"
  done
}

# Packages with daemons must not start them. policy-rc.d is what Debian asks;
# one that is there already is put back afterwards.
policy=/usr/sbin/policy-rc.d
forbid_daemons() {
  trap allow_daemons EXIT
  trap 'exit 130' INT TERM HUP
  if [[ ! -e $policy.before-shunt && -e $policy ]]; then
    mv "$policy" "$policy.before-shunt"
  fi
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
}
allow_daemons() {
  rm -f "$policy"
  if [[ -e $policy.before-shunt ]]; then mv "$policy.before-shunt" "$policy"; fi
}

apt() {
  DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" </dev/null
}

candidate() {
  local version
  version=$(LC_ALL=C apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" {print $2}')
  [[ -n $version && $version != '(none)' ]]
}

updated=
install() { # PACKAGE...
  command -v apt-get >/dev/null || die "this is no Debian or Ubuntu: install by your own means: $*"
  [[ $(id -u) == 0 ]] || die "missing: $*" 'run this as root, or install them yourself'
  if [[ -z $updated ]]; then
    echo "install-deps: apt-get update"
    apt update || die "apt-get update failed; needed are: $*"
    updated=1
  fi
  local package absent=()
  for package; do candidate "$package" || absent+=("$package"); done
  if ((${#absent[@]})); then
    local remedy='install what stands in for it yourself'
    [[ ${absent[*]} == *-19* ]] && remedy='only make generate and its check need it'
    # shellcheck disable=SC1091
    die "$(. /etc/os-release && echo "$PRETTY_NAME") has no package ${absent[*]}: $remedy"
  fi
  echo "install-deps: apt-get install $*"
  forbid_daemons
  apt install --no-install-recommends "$@" >/dev/null || die "apt-get install $* failed"
  allow_daemons
  trap - EXIT INT TERM HUP
}

# Go, in the version that go.mod asks for. Any Go from 1.21 on gets that by
# itself, as a module, unless GOTOOLCHAIN says otherwise.
need_go() {
  local want
  want=$(awk '$1 == "go" {print $2}' go.mod)
  if ! command -v go >/dev/null && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    [[ -n $updated ]] || apt update
    updated=1
    local newest
    newest=$(apt-cache pkgnames golang-1. | grep -xE 'golang-1\.(2[1-9]|[3-9][0-9])-go' | sort -V | tail -n 1) || true
    if [[ -n $newest ]]; then
      install "${newest}"
      ln -sf "/usr/lib/${newest%-go}/bin/go" /usr/local/bin/go
      echo "install-deps: /usr/local/bin/go is now ${newest%-go}"
    fi
  fi
  command -v go >/dev/null ||
    die "Go $want or newer is needed, and this distribution has none that could get it:" \
      'unpack the release of the Go project to /usr/local/go'
  # What runs in this directory is what go.mod asks for, or an error.
  go version >/dev/null ||
    die "Go $want is needed, this is $(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null || echo older) (GOTOOLCHAIN=$(cd / && go env GOTOOLCHAIN))" \
      'with GOTOOLCHAIN=auto a Go from 1.21 on gets it by itself'
}

[[ $# -gt 0 ]] || die 'usage: install-deps.sh build|demo|image|test|e2e|kernels|lint|generate ...'
wanted=()
for set in "$@"; do
  case $set in
    build | demo | image | test | e2e | kernels | lint | generate) mapfile -t -O "${#wanted[@]}" wanted < <(missing "$set") ;;
    *) die "no such set: $set" ;;
  esac
done
if ((${#wanted[@]})); then
  mapfile -t wanted < <(printf '%s\n' "${wanted[@]}" | sort -u)
  install "${wanted[@]}"
fi
need_go
