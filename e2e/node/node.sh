#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# node.sh: a Kubernetes cluster of one real node in namespaces of its own, from
# Debian packages and Go modules: etcd, kube-apiserver, kube-scheduler,
# kube-controller-manager, kubelet; containerd, runc, the reference CNI plugins.
#
#   node.sh build MODE...        build what nodes of these modes need and the cache has not yet
#   node.sh built MODE...        whether nothing that takes long is left to build
#   node.sh up NAME MODE         start node NAME; what is left of one of that name is ended first
#   node.sh exec NAME CMD...     run CMD in the node's namespaces, by absolute path
#   node.sh kubectl NAME ARGS... kubectl, where the machine has one
#   node.sh down NAME            end it: every process, mount, namespace and cgroup of it
#   node.sh start DAEMON         within the node: start a daemon of it again
#
# MODE v2: /sys/fs/cgroup is cgroup2. Where the machine has its controllers in
#      cgroup v1, limits are dropped, and a kubelet can't be restarted.
# MODE hybrid: the machine's v1 controllers, and cgroup2 at /sys/fs/cgroup/unified.
# MODE containerd2: as v2, with containerd 2.x, which is built.
#
# The host sees none of it but processes, cgroups of the node's name, and files
# in the cache. CACHE ($E2E_CACHE) holds what was built, keyed by go.sum.
set -euo pipefail
self=$(readlink -f "$0")
here=$(dirname "$self")
root=$(dirname "$(dirname "$here")")
PATH=$PATH:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

cache=${E2E_CACHE:-$root/.cache/e2e}
containerd=${E2E_CONTAINERD:-/usr/bin/containerd} # of the modes without one of their own; its shim has to lie beside it
ip=192.0.2.1
cgroups=/sys/fs/cgroup
daemons=(etcd kube-apiserver kube-controller-manager kube-scheduler kubelet)

say() { printf 'node: %s\n' "$*"; }
die() {
  say "$*" >&2
  exit 1
}

# module_dir NAME FOLDER: where the build of a module of this folder is kept, by
# all that it is made of.
module_dir() {
  local key
  key=$(cd "$here/$2" && { find . -type f | LC_ALL=C sort | xargs cat && go env GOVERSION GOARCH; } | sha256sum)
  echo "$cache/$1-${key:0:16}"
}
hyper_dir() { module_dir kubernetes hyper; }
containerd_dir() { module_dir containerd containerd; }

# module_version FOLDER MODULE
module_version() { sed -nE "s,^[[:space:]]*$2 (v[^ ]+).*,\\1,p" "$here/$1/go.mod"; }

# keep DIR COMMAND...: DIR as the command makes it, in "$new", unless it is there.
keep() {
  local dir=$1 new=$1.new began=$SECONDS
  shift
  [[ ! -d $dir ]] || return 0
  rm -rf "$new" && mkdir "$new"
  "$@"
  mv "$new" "$dir"
  say "$(basename "$dir"): built in $((SECONDS - began)) s"
}

build_hyper() {
  local name version
  version=$(module_version hyper k8s.io/kubernetes)
  say "building Kubernetes $version; with two cores this takes about ten minutes"
  (cd "$here/hyper" && go build -trimpath -o "$new/hyper" -ldflags "-s -w
    -X k8s.io/component-base/version.gitVersion=$version
    -X k8s.io/component-base/version.gitMajor=$(cut -d. -f1 <<<"${version#v}")
    -X k8s.io/component-base/version.gitMinor=$(cut -d. -f2 <<<"$version")" .)
  for name in "${daemons[@]}"; do ln -s hyper "$new/$name"; done
}

build_containerd() {
  local version
  version=$(module_version containerd github.com/containerd/containerd/v2)
  say "building containerd $version; with two cores this takes about three minutes"
  (cd "$here/containerd" && go build -trimpath -o "$new/" -ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=$version" tool)
}

build() { # MODE...
  mkdir -p "$cache"
  export CGO_ENABLED=0
  keep "$(hyper_dir)" build_hyper
  [[ " $* " != *' containerd2 '* ]] || keep "$(containerd_dir)" build_containerd
  (cd "$root" && go build -trimpath -ldflags '-s -w' -o "$cache/" ./e2e/node/runcwrap ./e2e/workload)
  pack workload "$cache/workload"
  pack haproxy "$(command -v haproxy)"
}

built() { # MODE...
  [[ -d $(hyper_dir) && (" $* " != *' containerd2 '* || -d $(containerd_dir)) ]]
}

# pack NAME PROGRAM: an image of one program and the libraries that it needs.
pack() {
  local dir sum library
  dir=$(mktemp -d "$cache/pack-XXXXXX")
  mkdir -p "$dir"/root/{dev,etc,proc,sys,tmp}
  cp "$2" "$dir/root/$1"
  { ldd "$2" 2>/dev/null || true; } | sed -nE 's,.*[[:space:]](/[^ ]+) \(0x.*,\1,p' | while read -r library; do
    mkdir -p "$dir/root$(dirname "$library")"
    cp -L "$library" "$dir/root$library"
  done
  tar -C "$dir/root" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf "$dir/layer.tar" .
  sum=$(sha256sum <"$dir/layer.tar")
  printf '{"architecture":"%s","os":"linux","config":{"Entrypoint":["/%s"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
    "$(go env GOARCH)" "$1" "${sum%% *}" >"$dir/config.json"
  printf '[{"Config":"config.json","RepoTags":["localhost/shunt-e2e/%s:1"],"Layers":["layer.tar"]}]' "$1" >"$dir/manifest.json"
  tar -C "$dir" -cf "$cache/$1.tar" manifest.json config.json layer.tar
  rm -rf "$dir"
}

up() { # NAME MODE: outside of the node
  export NAME=$1 MODE=$2 D=$cache/run/$1
  [[ ! -e $D ]] || down "$NAME"
  mkdir -p "$D"
  HYPER=$(hyper_dir)
  export HYPER
  if [[ $MODE == containerd2 ]]; then
    containerd=$(containerd_dir)/containerd
  fi
  export E2E_CONTAINERD=$containerd
  [[ -x $HYPER/hyper && -x $containerd ]] || die "there is no $HYPER/hyper, or no $containerd: run node.sh build $MODE"
  setsid "$self" _join >"$D/node.log" 2>&1 </dev/null &
  local outer=$!
  echo "$outer $(start_time "$outer")" >"$D/outer"
  until [[ -e $D/ready ]]; do
    alive "$D" || break
    sleep 0.05
  done
  cat "$D/node.log"
  grep -qsx ok "$D/ready" || {
    down "$NAME"
    die "$NAME did not come up"
  }
}

start_time() { awk '{sub(/.*\) /, ""); print $20}' "/proc/$1/stat" 2>/dev/null || true; }

# alive DIR: the process that the node was started as is there, and no other of
# its number.
alive() {
  local pid began
  read -r pid began <"$1/outer" && [[ -n $began && $(start_time "$pid") == "$began" ]]
}

# join makes a cgroup of the node's own in every hierarchy, below this one's.
join() {
  local all controllers path dir f
  all=$(cat /proc/self/cgroup) # whole, first: moving changes it
  while IFS=: read -r _ controllers path; do
    case $controllers in
      '')
        dir=$cgroups/unified$path
        [[ -d $cgroups/unified ]] || dir=$cgroups$path
        ;;
      name=*) dir=$cgroups/${controllers#name=}$path ;;
      *) dir=$cgroups/$controllers$path ;;
    esac
    dir=${dir%/}/$NAME
    echo "$dir" >>"$D/cgroups"
    mkdir -p "$dir"
    if [[ $controllers == cpuset ]]; then
      for f in cpuset.cpus cpuset.mems; do cat "${dir%/*}/$f" >"$dir/$f"; done
    fi
    echo $$ >"$dir/cgroup.procs"
  done <<<"$all"
  exec unshare --net --mount --uts --ipc --pid --cgroup --propagation private --fork --kill-child --mount-proc "$self" _init
}

init() { # pid 1 of the node
  hostname "$NAME"
  mount --make-rshared /
  mounts
  network
  began=$(date +%s%N)
  if (set -e && setup); then echo ok >"$D/ready.new"; else echo failed >"$D/ready.new"; fi
  mv "$D/ready.new" "$D/ready"
  while :; do # bash as pid 1 reaps orphans
    sleep 3600 &
    wait $! || true
  done
}

mounts() {
  umount -R -l /sys
  mount -t sysfs sysfs /sys
  if [[ $MODE != hybrid ]]; then mount -t cgroup2 cgroup2 $cgroups; else
    mount -t tmpfs -o mode=755 tmpfs $cgroups
    local c
    for c in cpu cpuacct cpuset memory devices freezer blkio pids; do
      mkdir $cgroups/$c
      mount -t cgroup -o $c cgroup $cgroups/$c
    done
    mkdir $cgroups/systemd $cgroups/unified
    mount -t cgroup -o none,name=systemd cgroup $cgroups/systemd
    mount -t cgroup2 cgroup2 $cgroups/unified
  fi
  mount -t bpf -o mode=700 bpf /sys/fs/bpf
  # The host's own files are not written to.
  mount -t tmpfs -o mode=755 tmpfs /run
  mkdir -p /run/netns /run/lock /run/containerd /run/k8s/pki /run/etc/{upper,work}
  mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work overlay /etc
  mount -t tmpfs -o mode=755 tmpfs /opt
  mount -t tmpfs -o mode=755 tmpfs /var
  mkdir -p /opt/cni/bin /etc/cni/net.d /var/lib /var/log /var/tmp
  ln -s /run /var/run
  # The kubelet writes sysctls of the whole machine: it finds private copies
  # that have its values.
  local i=0 entry
  for entry in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    i=$((i + 1))
    echo "${entry#*=}" >/run/k8s/sysctl$i
    mount --bind /run/k8s/sysctl$i "/proc/sys/${entry%=*}"
  done
}

network() {
  ip link set lo up
  ip link add eth0 type veth peer name eth0p # not every kernel has dummy devices
  ip link set eth0p up
  ip addr add $ip/24 dev eth0
  ip link set eth0 up
  ip route add default via 192.0.2.254
  sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
}

lap() { say "$(printf '%-26s %6d ms' "$1" $((($(date +%s%N) - began) / 1000000)))"; }

setup() {
  configure
  start containerd
  start etcd
  until curl -sf http://127.0.0.1:2379/health >/dev/null; do
    running etcd
    sleep 0.05
  done
  start kube-apiserver
  until ctr version >/dev/null 2>&1; do
    running containerd
    sleep 0.05
  done
  local image
  for image in workload haproxy; do ctr -n k8s.io images import "$cache/$image.tar" >/dev/null; done
  lap 'containerd has its images'
  until curl -skf https://$ip:6443/readyz >/dev/null; do
    running kube-apiserver
    sleep 0.05
  done
  lap 'kube-apiserver is ready'
  start kube-controller-manager
  start kube-scheduler
  # Without kube-proxy: the one service that pods need.
  local hook
  for hook in PREROUTING OUTPUT; do
    iptables -t nat -A $hook -d 10.96.0.1 -p tcp --dport 443 -j DNAT --to-destination $ip:6443
  done
  start kubelet
  until curl -sf http://127.0.0.1:10255/healthz >/dev/null; do
    running kubelet
    sleep 0.05
  done
  lap 'kubelet is healthy'
}

configure() {
  local name
  for name in /usr/lib/cni/*; do ln -s "$name" /opt/cni/bin/; done
  cat >/etc/cni/net.d/10-pods.conflist <<'END'
{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": "/run/ipam",
              "ranges": [[{"subnet": "10.244.0.0/24"}], [{"subnet": "fd00:10:244::/64"}]],
              "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
END
  local runc version=2 images='[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/shunt-e2e/workload:1"' cri='plugins."io.containerd.grpc.v1.cri"' bin='bin_dir = "/opt/cni/bin"'
  runc=$(command -v runc)
  [[ $MODE == hybrid ]] || runc=$cache/runcwrap
  if "$containerd" --version | grep -qE ' v?2\.'; then
    version=3 bin='bin_dirs = ["/opt/cni/bin"]' cri='plugins."io.containerd.cri.v1.runtime"'
    images='[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "localhost/shunt-e2e/workload:1"
[plugins."io.containerd.cri.v1.runtime"]'
  fi
  cat >/run/k8s/containerd.toml <<END
version = $version
root = "/run/ctd"
state = "/run/containerd/state"
oom_score = 0
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.nri.v1.nri"]
[grpc]
  address = "/run/containerd/containerd.sock"
$images
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  [$cri.cni]
    $bin
    conf_dir = "/etc/cni/net.d"
  [$cri.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [$cri.containerd.runtimes.runc.options]
      BinaryName = "$runc"
      SystemdCgroup = false
END
  openssl ecparam -name prime256v1 -genkey -noout -out /run/k8s/pki/sa.key
  openssl ec -in /run/k8s/pki/sa.key -pubout -out /run/k8s/pki/sa.pub 2>/dev/null
  printf '%s\n' 'admin-token,admin,admin,system:masters' 'kcm-token,kcm,kcm,system:masters' \
    'scheduler-token,system:kube-scheduler,scheduler,' \
    "node-token,system:node:$NAME,node,system:nodes" >/run/k8s/tokens.csv
  local user
  for user in admin kcm scheduler node; do
    cat >/run/k8s/$user.conf <<END
apiVersion: v1
kind: Config
clusters: [{name: node, cluster: {server: "https://$ip:6443", insecure-skip-tls-verify: true}}]
users: [{name: user, user: {token: $user-token}}]
contexts: [{name: context, context: {cluster: node, user: user}}]
current-context: context
END
  done
  cat >/run/k8s/kubelet.yaml <<'END'
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupsPerQOS: true
enforceNodeAllocatable: [pods]
failSwapOn: false
failCgroupV1: false
oomScoreAdj: 0
maxOpenFiles: 20000
evictionHard: {memory.available: "0%", nodefs.available: "0%", imagefs.available: "0%", nodefs.inodesFree: "0%", imagefs.inodesFree: "0%"}
imageGCHighThresholdPercent: 100
resolvConf: ""
maxPods: 200
registryPullQPS: 0
eventRecordQPS: 0
staticPodPath: /run/k8s/manifests
fileCheckFrequency: 1s
readOnlyPort: 10255
podLogsDir: /run/k8s/podlogs
volumePluginDir: /run/k8s/volume-plugins
END
  mkdir -p /run/k8s/{manifests,podlogs}
  declare -p NAME MODE D HYPER cache containerd >/run/k8s/env
}

# start DAEMON: in the background; its process is in /run/k8s/DAEMON.pid.
start() {
  local command
  case $1 in
    containerd) command=("$containerd" -c containerd.toml) ;;
    etcd) command=("$HYPER/etcd" --data-dir /run/etcd --unsafe-no-fsync --log-level warn --initial-cluster default=http://127.0.0.1:2380
      --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379
      --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380) ;;
    kube-apiserver) command=("$HYPER/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --cert-dir=pki
      --bind-address=0.0.0.0 --advertise-address="$ip" --service-cluster-ip-range=10.96.0.0/16
      --service-account-issuer=https://kubernetes.default.svc --service-account-key-file=pki/sa.pub
      --service-account-signing-key-file=pki/sa.key --token-auth-file=tokens.csv '--authorization-mode=Node,RBAC'
      --enable-admission-plugins=NodeRestriction --allow-privileged=true --kubelet-preferred-address-types=InternalIP) ;;
    kube-controller-manager) command=("$HYPER/kube-controller-manager" --kubeconfig=kcm.conf --leader-elect=false
      --service-account-private-key-file=pki/sa.key --root-ca-file=pki/apiserver.crt --bind-address=127.0.0.1 --cert-dir=kcm
      --flex-volume-plugin-dir=/run/k8s/volume-plugins) ;;
    kube-scheduler) command=("$HYPER/kube-scheduler" --kubeconfig=scheduler.conf --leader-elect=false
      --bind-address=127.0.0.1 --cert-dir=scheduler) ;;
    kubelet) command=("$HYPER/kubelet" --config=kubelet.yaml --kubeconfig=node.conf --hostname-override="$NAME"
      --node-ip="$ip" --root-dir=/run/kubelet --cert-dir=kubelet-pki --v=2) ;;
    *) die "$1 is no daemon of the node: containerd ${daemons[*]}" ;;
  esac
  cd /run/k8s
  RUNCWRAP_RUNC=$(command -v runc) PATH=$(dirname "$containerd"):$PATH setsid "${command[@]}" >>"$D/$1.log" 2>&1 </dev/null &
  echo $! >"/run/k8s/$1.pid"
}

# running DAEMON fails with the end of its log once it has ended.
running() {
  local pid
  pid=$(cat "/run/k8s/$1.pid")
  kill -0 "$pid" 2>/dev/null || {
    say "$1 has ended:"
    tail -n 5 "$D/$1.log"
    return 1
  }
}

# init_pid NAME: the node's pid 1, as the host numbers it.
init_pid() {
  local pid
  alive "$cache/run/$1" || die "$1 is not up"
  read -r pid _ <"$cache/run/$1/outer"
  read -r pid _ <"/proc/$pid/task/$pid/children"
  echo "$pid"
}

down() {
  local D=$cache/run/$1 pid dir left
  if [[ -e $D/outer ]] && alive "$D"; then
    read -r pid _ <"$D/outer"
    kill -9 "$pid" # --kill-child takes the node's pid 1 along, and that everything in it
  fi
  for _ in $(seq 400); do
    left=()
    while read -r dir; do
      [[ -d $dir ]] || continue
      find "$dir" -depth -type d -exec rmdir {} \; 2>/dev/null || true
      [[ ! -d $dir ]] || left+=("$dir")
    done <"$D/cgroups"
    [[ ${#left[@]} -gt 0 ]] || {
      rm -rf "$D"
      return 0
    }
    sleep 0.05
  done
  die "left of $1: ${left[*]}"
}

case ${1:-} in
  build)
    shift
    build "$@"
    ;;
  built)
    shift
    built "$@"
    ;;
  up) up "$2" "$3" ;;
  down) [[ ! -e $cache/run/$2 ]] || down "$2" ;;
  _join) join ;;
  _init) init ;;
  start)
    # shellcheck disable=SC1091 # written by configure
    . /run/k8s/env
    start "$2"
    ;;
  exec)
    pid=$(init_pid "$2")
    shift 2
    exec nsenter -t "$pid" -a -- "$@"
    ;;
  kubectl)
    pid=$(init_pid "$2")
    shift 2
    exec nsenter -t "$pid" -a -- env KUBECONFIG=/run/k8s/admin.conf kubectl "$@"
    ;;
  *)
    sed -n '4,22p' "$self"
    exit 2
    ;;
esac
