#!/usr/bin/env bash
# clang-tidy with the checks of .clang-tidy; exits 1 on any finding.
#
#   tools/tidy.sh [FILE.cc …]    these files; without any, those that differ from branch main
#
# Reads how a file is compiled from build/compile_commands.json (the preset "dev"), so the build must be
# configured, and built once for the generated headers. A file takes some ten seconds; the whole tree is
# the preset "tidy".
set -euo pipefail
cd "$(dirname "$0")/.."

files=("$@")
if [ ${#files[@]} -eq 0 ]; then
  mapfile -t files < <(git diff --name-only --diff-filter=d "$(git merge-base main HEAD)" -- \
    'base/*.cc' 'bench/*.cc' 'cli/*.cc' 'clients/*.cc' 'core/*.cc' 'decoder/*.cc' 'kernels/*.cc' \
    'kvstore/*.cc' 'replay/*.cc' 'rpc/*.cc' 'services/*.cc' 'worker/*.cc')
fi
if [ ${#files[@]} -eq 0 ]; then
  echo "tidy: no file differs from main"
  exit 0
fi
printf '%s\0' "${files[@]}" |
  xargs -0 -n 1 -P "$(nproc)" clang-tidy-14 -p build --quiet --warnings-as-errors='*'
echo "tidy: ${#files[@]} files, no finding"
