#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# setup.sh KERNEL...: make machines with other kernels, for run.sh: Debian's cloud
# kernels, from the mirror that this machine's apt uses, with what tests want of
# this machine's programs. KERNEL is 5.10, 6.1, 6.12, or another of the mirror's
# backports. The system's own packages are left alone: all lies below VM_CACHE
# (.cache/kernels), by the kernel's release; what is there already is kept.
#
# Exit status 3: the mirror has no such kernel.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
cache=${VM_CACHE:-$root/.cache/kernels}
mkdir -p "$cache"/{debs,unpacked,k,apt}
cache=$(cd "$cache" && pwd)
key=/usr/share/keyrings/debian-archive-keyring.gpg

die() { # STATUS TEXT
  echo "setup.sh: $2" >&2
  exit "$1"
}

# shellcheck disable=SC2016 # apt's variable
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Label: Debian' | sort -u | head -n 1)
[[ -n $mirror ]] || die 3 "this machine's apt has no mirror of Debian"

# suite SUITE: from here on apt is that of a suite, with lists of its own.
suite() {
  local dir=$cache/apt/$1
  options=(-qq -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$dir/lists"
    -o "Dir::Cache=$dir/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none)
  # A list that is older than a day may name packages that are gone.
  [[ -z $(find "$dir/updated" -mtime -1 2>/dev/null) ]] || return 0
  mkdir -p "$dir"/lists/partial "$dir"/cache/archives/partial
  echo "deb [signed-by=$key] $mirror $1 main" >"$dir/sources.list"
  apt-get "${options[@]}" update || die 3 "the mirror has no suite $1"
  touch "$dir/updated"
}

unpack() { # PACKAGE DIRECTORY
  (
    cd "$cache/debs"
    compgen -G "$1_*.deb" >/dev/null || apt-get "${options[@]}" download "$1"
    dpkg-deb -x "$1"_*.deb "$2"
  )
}

# program FILE PLACE: a program with its libraries, into the guest.
program() {
  local library
  mkdir -p "$guest/$(dirname "$2")"
  cp -L "$1" "$guest/$2"
  { ldd "$1" 2>/dev/null || true; } | grep -oE '/[^ ]+' | while read -r library; do
    [[ -e $guest/$library ]] || {
      mkdir -p "$guest/$(dirname "$library")"
      cp -L "$library" "$guest/$library"
    }
  done
}

programs() {
  local name form
  mkdir -p "$guest"/{bin,sbin,usr/bin,usr/sbin,proc,sys,dev,tmp,run,etc,root,var,out}
  cp "$(command -v busybox)" "$guest/bin/busybox"
  for name in $("$guest/bin/busybox" --list); do
    case $name in
      busybox | ip | tc | modprobe | insmod | lsmod | rmmod | depmod | modinfo | ss | init | linuxrc) ;;
      *) ln -s /bin/busybox "$guest/bin/$name" ;;
    esac
  done
  rm -f "$guest/bin/sh"
  program "$(readlink -f /bin/sh)" /bin/sh
  program "$kmod" /sbin/kmod
  for name in modprobe insmod lsmod rmmod; do ln -s kmod "$guest/sbin/$name"; done
  # busybox's own would start its own ip and tc.
  for name in ip tc nft ss bash nsenter unshare setpriv env timeout xargs find nice chroot setsid flock; do
    if command -v "$name" >/dev/null; then
      rm -f "$guest/bin/$name"
      program "$(readlink -f "$(command -v "$name")")" "/usr/sbin/$name"
    fi
  done
  for form in nft legacy; do
    program "$(readlink -f "$(command -v iptables-$form)")" "/usr/sbin/xtables-$form-multi"
    for name in iptables ip6tables; do
      for action in '' -save -restore; do
        ln -s xtables-$form-multi "$guest/usr/sbin/$name-$form$action"
        [[ $form == legacy ]] || ln -s xtables-nft-multi "$guest/usr/sbin/$name$action"
      done
    done
  done
  mkdir -p "$guest/usr/lib/x86_64-linux-gnu" "$guest/etc/iproute2"
  cp -a /usr/lib/x86_64-linux-gnu/xtables "$guest/usr/lib/x86_64-linux-gnu/"
  cp /etc/protocols /etc/services "$guest/etc/" 2>/dev/null || true
  printf 'root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$guest/etc/passwd"
  printf 'root:x:0:\nnogroup:x:65534:\n' >"$guest/etc/group"
  printf '127.0.0.1 localhost\n::1 localhost\n' >"$guest/etc/hosts"
  printf 'passwd: files\ngroup: files\nhosts: files\n' >"$guest/etc/nsswitch.conf"
  install -m 755 "$root/scripts/kernels/init" "$guest/init"
}

# modules of the network, and what else tests may want.
modules() {
  local path to=$guest/lib/modules/$release
  mkdir -p "$to"
  (
    cd "$1"
    for path in kernel/net/{802,8021q,bridge,core,ipv4,ipv6,key,llc,netfilter,netlink,packet,sched,unix,xfrm,tls,mptcp} \
      kernel/drivers/net/{veth,dummy,tun,ifb,macvlan,ipvlan,vxlan,vrf} kernel/fs/overlayfs kernel/lib kernel/crypto; do
      if [[ -d $path ]]; then find "$path" -name '*.ko*'; else compgen -G "$path.ko*" || true; fi
    done
    ls modules.builtin* modules.order
  ) >"$guest.modules"
  tar -C "$1" -cf - -T "$guest.modules" | tar -C "$to" -xf -
  find "$to" -name '*.ko.xz' -exec xz -d {} +
  find "$to" -name '*.ko.zst' -exec zstd -dq --rm {} +
  sed -i -E 's/\.ko\.(xz|zst|gz)$/.ko/' "$to/modules.order"
  (exec -a depmod "$kmod" -b "$guest" "$release")
}

[[ $# -gt 0 ]] || die 2 'usage: setup.sh KERNEL...'
for name; do
  case $name in
    5.10) from=bullseye pattern='^linux-image-5\.10\.[0-9]+-[0-9]+-cloud-amd64$' ;;
    6.1) from=bookworm pattern='^linux-image-6\.1\.0-[0-9]+-cloud-amd64$' ;;
    6.12) from=trixie pattern='^linux-image-6\.12\.[0-9]+\+deb13-cloud-amd64$' ;;
    [0-9]*.[0-9]*) from=trixie-backports pattern="^linux-image-${name/./\\.}\.[0-9]+\+deb13-cloud-amd64\$" ;;
    *) die 2 "no kernel's version: $name" ;;
  esac
  suite "$from"
  package=$(apt-cache "${options[@]}" pkgnames | grep -E "$pattern" | sort -V | tail -n 1) || true
  [[ -n $package ]] || die 3 "the mirror has no kernel $name"
  release=${package#linux-image-}
  # The machine is made anew when the kernel is another, or these scripts are.
  stamp="$release $(cat "$0" "$root/scripts/kernels/init" | sha256sum | cut -c 1-16)"
  if [[ $(cat "$cache/k/$name/made" 2>/dev/null) == "$stamp" ]]; then
    continue
  fi
  unpacked=$cache/unpacked/$release
  [[ -d $unpacked ]] || {
    rm -rf "$unpacked.part"
    unpack "$package" "$unpacked.part"
    # From 7.0 on it comes in pieces.
    if ! compgen -G "$unpacked.part/boot/vmlinuz-*" >/dev/null; then
      for part in linux-binary linux-modules linux-base; do unpack "$part-$release" "$unpacked.part" || true; done
    fi
    mv "$unpacked.part" "$unpacked"
  }
  kmod=$(command -v kmod) || {
    kmod=$cache/unpacked/kmod/bin/kmod
    [[ -x $kmod ]] || { suite bookworm && unpack kmod "$cache/unpacked/kmod"; }
  }
  made=$cache/k/$name guest=$cache/k/$name.new
  rm -rf "$made" "$guest" "$guest.modules"
  mkdir -p "$guest" "$made"
  programs
  modules "$(find "$unpacked" -type d -path "*/lib/modules/$release" -print -quit)"
  (cd "$guest" && find . | LC_ALL=C sort | busybox cpio -o -H newc 2>/dev/null) >"$made/base.cpio"
  cp "$(find "$unpacked" -name 'vmlinuz*' -type f -print -quit)" "$made/vmlinuz"
  rm -rf "$guest" "$guest.modules"
  echo "$stamp" >"$made/made"
  echo "setup.sh: kernel $name is $release"
done
