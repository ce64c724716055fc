#!/usr/bin/env bash
# From a fresh clone to a running fleet: installs what is missing, builds release, runs the demo (which
# starts router, two workers and the store on loopback and stops them), and prints its result.
#
#   deploy/quickstart.sh [--engine llama.cpp] [--keep] [--no-setup] [--bin DIR] [-- arguments of the demo]
#     --engine llama.cpp  instead of the demo: chat, retrieval and agent prompts with a real engine and a real model
#                 (the first time builds llama-cpp-python and fetches Gemma 3 270M), cold and warm, in one process,
#                 in another one, after a restart of everything, on another worker: a table and a plot
#     --keep      leaves the service up after the demo and prints grpcurl lines to try; Ctrl-C stops it
#     --no-setup  installs nothing
#     --bin DIR   takes the programs from there instead of building them
# Exit code: the demo's, or 1 when a program did not start or did not stop cleanly.
set -euo pipefail
cd "$(dirname "$0")/.."

engine=demo
keep=false
setup=true
bin=
while [ $# -gt 0 ]; do
  case "$1" in
    --engine)
      if [ "${2:-}" != llama.cpp ]; then
        echo "quickstart: --engine '${2:-}': llama.cpp is the only one" >&2
        exit 2
      fi
      engine=$2
      shift
      ;;
    --bin)
      bin=$(realpath -e -- "${2:-}") || exit 2
      shift
      ;;
    --keep) keep=true ;;
    --no-setup) setup=false ;;
    --)
      shift
      break
      ;;
    *)
      echo "quickstart: unknown argument '$1'" >&2
      exit 2
      ;;
  esac
  shift
done

say() { printf '== %s\n' "$*"; }

if $setup; then
  if $keep; then deploy/setup.sh --grpcurl; else deploy/setup.sh; fi
fi

if [ -z "$bin" ]; then
  say "building release (the first time takes some minutes)"
  cmake --preset release -Wno-dev > /dev/null
  cmake --build --preset release
  bin=$PWD/build-release/bin
fi
readonly bin

# Every process of this run by name; logs and data in a folder that goes with it.
run_dir=$(mktemp -d "${TMPDIR:-/tmp}/pagetide-quickstart.XXXXXX")
names=()
declare -A pid_of grpc_of metrics_of

# start NAME PROGRAM [ARGUMENT…]: returns when the program printed "… ready grpc=… metrics=…".
start() {
  local name=$1
  shift
  # Outside the terminal's process group: Ctrl-C reaches this script alone, which then asks each
  # program once. A second signal would end it without a drain.
  setsid "$@" > "$run_dir/$name.out" 2> "$run_dir/$name.log" &
  pid_of[$name]=$!
  names+=("$name")
  local waited=0
  local line
  until line=$(grep -m 1 ' ready ' "$run_dir/$name.out"); do
    if ! kill -0 "${pid_of[$name]}" 2> /dev/null || [ "$waited" -ge 300 ]; then
      echo "quickstart: $name did not start:" >&2
      tail -n 20 "$run_dir/$name.log" >&2
      exit 1
    fi
    sleep 0.1
    waited=$((waited + 1))
  done
  grpc_of[$name]=$(sed -E 's/.* grpc=([^ ]+).*/\1/' <<< "$line")
  metrics_of[$name]=$(sed -E 's/.* metrics=([^ ]+).*/\1/' <<< "$line")
  say "$name: pid ${pid_of[$name]}, grpc ${grpc_of[$name]}, metrics http://${metrics_of[$name]}/metrics"
}

# Asks all to end in the reverse order of their start, so that none loses what it stands on while it drains, and looks at
# their exit codes.
stop_all() {
  local code=0
  local i name status
  for ((i = ${#names[@]} - 1; i >= 0; --i)); do
    name=${names[$i]}
    kill -TERM "${pid_of[$name]}" 2> /dev/null || true
    status=0
    wait "${pid_of[$name]}" || status=$?
    if [ "$status" -ne 0 ]; then
      echo "quickstart: $name ended with $status" >&2
      tail -n 20 "$run_dir/$name.log" >&2
      code=1
    fi
  done
  names=()
  return "$code"
}
# On every way out nothing is left running or lying around.
trap 'code=$?; trap - EXIT INT TERM; stop_all || code=1; rm -rf "$run_dir"; exit $code' EXIT
trap 'exit 130' INT TERM

# The demo and the scenes start fleets of their own on free ports of loopback, because they kill and restart parts of
# them on the way, and stop them.
demo_code=0
if [ "$engine" = llama.cpp ]; then
  say "scenes: llama.cpp with a store, a router and workers on loopback"
  PAGETIDE_BIN=$bin tests/connectors/llama_cpp/run.sh --build build-release scenes \
    --plot "$PWD/build-release/quickstart-llama.cpp.svg" "$@" || demo_code=$?
else
  say "demo: router, two workers and the store on loopback"
  "$bin/pagetide" demo "$@" || demo_code=$?
fi

if $keep; then
  start store "$bin/pagetide-store" --listen 127.0.0.1:0 --data-dir "$run_dir/store"
  start router "$bin/pagetide-router" --listen 127.0.0.1:0 --store "${grpc_of[store]}"
  for n in 0 1; do
    start "worker-$n" "$bin/pagetide-worker" --worker-id "worker-$n" --listen 127.0.0.1:0 \
      --local-socket "$run_dir/worker-$n.sock" --pool-bytes 256MiB \
      --store "${grpc_of[store]}" --router "${grpc_of[router]}"
  done
  grpcurl=$(command -v grpcurl || echo build/tools/grpcurl)
  say "the service stays up; Ctrl-C stops it. Things to try:"
  cat << LINES
  $grpcurl -plaintext ${grpc_of[router]} list
  $grpcurl -plaintext ${grpc_of[router]} describe pagetide.v1.RouterService
  $grpcurl -plaintext ${grpc_of[router]} grpc.health.v1.Health/Check
  $grpcurl -plaintext ${grpc_of[router]} pagetide.v1.RouterService/ListWorkers
  $grpcurl -plaintext ${grpc_of[store]} pagetide.v1.PageStoreService/GetStoreStats
  $bin/pagetide workers --router ${grpc_of[router]}
  curl -s http://${metrics_of[worker-0]}/metrics | grep pagetide_
LINES
  wait -n || true
fi
say "stopping"
exit "$demo_code"
