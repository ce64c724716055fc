#!/usr/bin/env bash
# Installs what is missing, builds, and runs the tests. The last lines are ctest's summary.
#
#   tests/run.sh           everything, optimised build
#   tests/run.sh --quick   only label "unit", nothing is installed
#   tests/run.sh --ci      thread-safety build, TSan, ASan + UBSan, then everything
#   tests/run.sh --stage clang|tsan|asan|full
#                          one stage of --ci
# What follows -- goes to ctest of the full run: tests/run.sh --quick -- -R FramePool
set -euo pipefail
cd "$(dirname "$0")/.."

jobs=$(nproc)
# Six parallel compilations need some 6 GiB; one job a GiB of memory at most.
memory_gib=$(awk '/MemTotal/ { print int($2 / 1048576) }' /proc/meminfo)
[ "$jobs" -le "$memory_gib" ] || jobs=$((memory_gib > 0 ? memory_gib : 1))

say() { printf '\n== %s [%s]\n' "$*" "$(date +%H:%M:%S)"; }
# configure PRESET; build PRESET [TARGET…]
configure() { cmake --preset "$1" -Wno-dev > "build-$1.log" 2>&1 || { cat "build-$1.log"; return 1; }; }
build() {
  local preset=$1
  shift
  local targets=()
  local target
  for target in "$@"; do targets+=(--target "$target"); done
  # ninja's own progress line needs a terminal; a CI log gets the failed steps and the last line.
  if [ -t 1 ]; then
    cmake --build --preset "$preset" -j "$jobs" "${targets[@]}"
  else
    cmake --build --preset "$preset" -j "$jobs" "${targets[@]}" > "build-$preset.log" 2>&1 ||
      { grep -E -A 30 '^FAILED:|: (fatal )?error:|: internal compiler error' "build-$preset.log" | cut -c 1-400 | head -200; return 1; }
    tail -n 1 "build-$preset.log"
  fi
}
# run_tests BUILD_DIR [ctest arguments]
run_tests() {
  local dir=$1
  shift
  ctest --test-dir "$dir" -j "$jobs" --output-on-failure --no-tests=error --progress "$@"
}

stage_clang() {
  say "clang: thread-safety analysis, warnings are errors"
  configure clang
  build clang pt_base pt_core pt_rpc worker/all kvstore/all
}
stage_tsan() {
  say "TSan: base, core, worker"
  configure tsan
  build tsan tests/base/all tests/core/all tests/worker/all
  local part
  for part in base core worker; do
    TSAN_OPTIONS=ignore_noninstrumented_modules=1 run_tests "build-tsan/tests/$part" -L unit
  done
}
stage_asan() {
  say "ASan + UBSan: base, core, kvstore, rpc, and the store over gRPC as a smoke test"
  configure asan
  build asan tests/base/all tests/core/all tests/kvstore/all tests/rpc/all page_store_service_test
  local part
  for part in base core kvstore rpc; do run_tests "build-asan/tests/$part" -L unit; done
  run_tests build-asan/tests/services -R '^page_store_service_test'
}
stage_full() {
  say "full: optimised build, every test"
  configure dev
  build dev
  run_tests build "$@"
}

mode=all
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) mode=quick ;;
    --ci) mode=ci ;;
    --stage)
      mode=stage
      stage=${2:?--stage needs a name}
      shift
      ;;
    --)
      shift
      break
      ;;
    *)
      echo "run.sh: unknown argument '$1'" >&2
      exit 2
      ;;
  esac
  shift
done

case "$mode" in
  quick) stage_full -L unit "$@" ;;
  all)
    deploy/setup.sh
    stage_full "$@"
    ;;
  stage)
    deploy/setup.sh --checks
    "stage_$stage" "$@"
    ;;
  ci)
    deploy/setup.sh --checks
    stage_clang
    stage_tsan
    stage_asan
    stage_full "$@"
    ;;
esac
