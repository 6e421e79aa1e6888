#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# run.sh KERNEL PROGRAM [ARGUMENT...]: run a static program, or a script, as root
# on another Linux kernel, in an emulated machine without network. KERNEL is one
# that setup.sh has made. So with Go:
#
#     CGO_ENABLED=0 go test -exec "$PWD/scripts/kernels/run.sh 6.1" -run Attach ./loader
#
# Exit status: the program's own; 124 it took too long; 125 no verdict (the
# kernel has panicked, or did not come up). From the environment:
#
#     VM_CACHE     as setup.sh's            VM_FILES     files and folders to have in the guest, at the same place
#     VM_TIMEOUT   seconds, 300             VM_ENV       names of variables to have in the guest
#     VM_MEMORY    MiB, 1024                VM_OUT       a folder to unpack the guest's /out into
set -euo pipefail
[[ $# -ge 2 ]] || {
  sed -n '4,16s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
root=$(cd "$(dirname "$0")/../.." && pwd)
kernel=$1 program=$2
shift 2
base=${VM_CACHE:-$root/.cache/kernels}/k/$kernel
[[ -e $base/vmlinuz && -e $base/base.cpio ]] || {
  echo "run.sh: there is no kernel $kernel: scripts/kernels/setup.sh $kernel makes it" >&2
  exit 2
}
[[ $program == */* ]] || program=$(command -v "$program")

work=$(mktemp -d "${TMPDIR:-/tmp}/shunt-vm.XXXXXX")
vm=''
# shellcheck disable=SC2317 # by the trap
finish() {
  [[ -z $vm ]] || kill -9 "$vm" 2>/dev/null || true
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 143' TERM INT HUP

# What this run adds to the guest's files: the kernel unpacks one archive over
# the other.
guest=$work/guest
mkdir -p "$guest/run.d" "$guest/test"
cp -L "$program" "$guest/test/"
add() {
  local path
  path=$(realpath -s "$1")
  mkdir -p "$guest/run.d/tree/$(dirname "$path")"
  cp -aL "$path" "$guest/run.d/tree/$path"
}
[[ ! -d testdata ]] || add testdata
for file in ${VM_FILES:-}; do add "$file"; done
{
  printf 'cd %q 2>/dev/null || { mkdir -p %q && cd %q; }\n' "$PWD" "$PWD" "$PWD"
  for name in ${VM_ENV:-}; do printf 'export %s=%q\n' "$name" "${!name:-}"; done
  printf 'exec %q' "/test/$(basename "$program")"
  for argument; do printf ' %q' "$argument"; done
  echo
} >"$guest/run.d/command"
(cd "$guest" && find . -mindepth 1 | busybox cpio -o -H newc 2>/dev/null) >"$work/run.cpio"
cat "$base/base.cpio" "$work/run.cpio" >"$work/initrd"
rm -rf "$guest" "$work/run.cpio"

# boot tries once; status is empty where the program has not ended, began where
# it has not begun.
boot() {
  local limit=${VM_TIMEOUT:-300} began_at=$SECONDS
  : >"$work/log"
  : >"$work/status"
  : >"$work/out.tar"
  # Without cx16: QEMU 7.2's cmpxchg16b corrupts flags, and kernels panic. q35:
  # microvm hangs at times. The four lines: the kernel's log, the program's
  # output, its status, an archive of /out.
  qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max,la57=off,cx16=off -smp 2 -m "${VM_MEMORY:-1024}" \
    -nodefaults -no-user-config -display none -no-reboot -kernel "$base/vmlinuz" -initrd "$work/initrd" \
    -append "console=ttyS0 panic=-1 oops=panic 8250.nr_uarts=4 mitigations=off nokaslr random.trust_cpu=on audit=0 cryptomgr.notests quiet" \
    -chardev "file,id=log,path=$work/log" -chardev stdio,id=console,signal=off \
    -chardev "file,id=status,path=$work/status" -chardev "file,id=out,path=$work/out.tar" \
    -serial chardev:log -serial chardev:console -serial chardev:status -serial chardev:out </dev/null &
  vm=$!
  why='no boot'
  while kill -0 "$vm" 2>/dev/null; do
    if ((SECONDS - began_at > limit)); then
      why="not done within $limit s"
    elif [[ ! -s $work/status ]] && ((SECONDS - began_at > 120)); then
      why='no boot within 120 s'
    elif grep -aq 'Kernel panic - not syncing' "$work/log"; then
      why='the kernel has panicked'
    else
      sleep 0.2
      continue
    fi
    kill -9 "$vm" 2>/dev/null || true
    break
  done
  wait "$vm" 2>/dev/null || true
  vm=''
  began=$(head -n 1 "$work/status")
  status=$(awk '$1 == "exit" {print $2}' "$work/status")
}
for try in 1 2 3; do
  boot
  [[ -z $began ]] || break # only what never came up is tried again
  echo "run.sh: boot $try of kernel $kernel: $why" >&2
done
if [[ -n ${VM_OUT:-} && -s $work/out.tar ]]; then
  mkdir -p "$VM_OUT"
  tar -xf "$work/out.tar" -C "$VM_OUT" --strip-components=1 out
fi
[[ -z $status ]] || exit "$status"
echo "run.sh: no verdict from kernel $kernel: $why; the end of its log:" >&2
tail -n 20 "$work/log" >&2
[[ $why != 'not done'* ]] || exit 124
exit 125
