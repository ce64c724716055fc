#!/usr/bin/env bash
# Runs every fuzz target for an equal share of the time and prints one JSON line a target:
#
#   tests/fuzz/campaign.sh --minutes N [--build DIR] [--work DIR] [TARGET…]
#
# target, seconds, execs, execs_per_second, crashes, coverage (edges), features, corpus (inputs kept).
# DIR holds the programs of the preset "fuzz" (cmake --preset fuzz && cmake --build --preset fuzz).
# What is found is kept in the work folder, to go on from and to look at: WORK/TARGET/corpus,
# WORK/TARGET/crash-*. Exit status 1 if anything crashed, hung or leaked. One process.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
minutes= build=$root/build-fuzz work=
targets=()
while [ $# -gt 0 ]; do
  case "$1" in
    --minutes) minutes=${2:?--minutes needs a number}; shift ;;
    --build) build=${2:?--build needs a folder}; shift ;;
    --work) work=${2:?--work needs a folder}; shift ;;
    -*) echo "campaign.sh: unknown argument '$1'" >&2; exit 2 ;;
    *) targets+=("$1") ;;
  esac
  shift
done
[ -n "$minutes" ] || { echo "campaign.sh: --minutes N is missing" >&2; exit 2; }
work=${work:-$build/campaign}
if [ ${#targets[@]} -eq 0 ]; then
  for program in "$build"/fuzz/*_fuzz; do
    [ -x "$program" ] && targets+=("$(basename "$program")")
  done
fi
[ ${#targets[@]} -gt 0 ] || { echo "campaign.sh: no target in $build/fuzz" >&2; exit 2; }
seconds=$((minutes * 60 / ${#targets[@]}))
[ "$seconds" -gt 0 ] || seconds=1

status=0
for target in "${targets[@]}"; do
  folder=$work/$target
  mkdir -p "$folder/corpus"
  log=$folder/log
  # Crashes do not end a target's time: the fork mode goes on with another process.
  begin=$(date +%s)
  "$build/fuzz/$target" -fork=1 -ignore_crashes=1 -ignore_ooms=1 -ignore_timeouts=1 \
    -max_total_time="$seconds" -max_len=16384 -timeout=10 -rss_limit_mb=1024 \
    -artifact_prefix="$folder/" "$folder/corpus" "$root/tests/fuzz/corpus/$target" \
    > "$log" 2>&1 || status=1
  end=$(date +%s)
  found=$(find "$folder" -maxdepth 1 \( -name 'crash-*' -o -name 'oom-*' -o -name 'timeout-*' \
          -o -name 'leak-*' \) -newermt "@$((begin - 1))" | wc -l)
  [ "$found" -eq 0 ] || status=1
  # "#123: cov: 45 ft: 67 corp: 8 exec/s: 9 oom/timeout/crash: 0/0/0 …"
  awk -v target="$target" -v seconds=$((end - begin)) -v found="$found" '
    /^#[0-9]+: cov:/ { execs = substr($1, 2) + 0; coverage = $3; features = $5; corpus = $7 }
    END {
      printf "{\"target\":\"%s\",\"seconds\":%d,\"execs\":%d,\"execs_per_second\":%d,", target,
             seconds, execs, (seconds > 0 ? execs / seconds : 0)
      printf "\"crashes\":%d,\"coverage\":%d,\"features\":%d,\"corpus\":%d}\n", found, coverage,
             features, corpus
    }' "$log"
done
exit "$status"
