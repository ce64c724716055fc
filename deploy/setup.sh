#!/usr/bin/env bash
# Installs what a fresh Debian 12 machine lacks to build, test and run PageTide. Idempotent: what is
# there is left alone, and nothing is asked of the network when nothing is missing.
#
#   deploy/setup.sh [--checks] [--grpcurl]
#     --checks   also clang 14, clang-tidy and clang-format (thread-safety build, CI)
#     --grpcurl  also grpcurl, built by Go into build/tools/
set -euo pipefail
cd "$(dirname "$0")/.."

readonly GRPCURL_VERSION=v1.8.9

packages=(
  # compilers and build
  build-essential cmake ninja-build pkg-config ccache lld python3
  # RPC
  libgrpc++-dev protobuf-compiler-grpc libprotobuf-dev protobuf-compiler grpc-proto libabsl-dev
  # storage, checksums, codecs
  librocksdb-dev libxxhash-dev libzstd-dev liblz4-dev libisal-dev libssl-dev
  # logs, metrics, command line
  libspdlog-dev prometheus-cpp-dev libcivetweb-dev libcurl4-openssl-dev libcli11-dev
  nlohmann-json3-dev libasio-dev
  # tests and benchmarks
  libgtest-dev libgmock-dev libbenchmark-dev librapidcheck-dev
)
with_grpcurl=false
for argument in "$@"; do
  case "$argument" in
    --checks) packages+=(clang-14 clang-tidy-14 clang-format-14) ;;
    --grpcurl) with_grpcurl=true ;;
    *) echo "setup: unknown argument '$argument'" >&2; exit 2 ;;
  esac
done

say() { printf 'setup: %s\n' "$*"; }
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo > /dev/null; then
    sudo "$@"
  else
    say "root rights are needed for: $*, and there is no sudo" >&2
    return 1
  fi
}
is_installed() {
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2> /dev/null)" = installed ]
}
# Installs those of the named packages that are missing.
install_missing() {
  local missing=()
  local package
  for package in "$@"; do
    is_installed "$package" || missing+=("$package")
  done
  if [ "${#missing[@]}" -eq 0 ]; then
    say "all $# packages are there"
    return
  fi
  say "installing ${#missing[@]} of $# packages: ${missing[*]}"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
  say "packages installed"
}

install_missing "${packages[@]}"

if $with_grpcurl; then
  tools="$PWD/build/tools"
  if [ -x "$tools/grpcurl" ] || command -v grpcurl > /dev/null; then
    say "grpcurl is there"
  else
    command -v go > /dev/null || install_missing golang-go
    say "building grpcurl $GRPCURL_VERSION"
    mkdir -p "$tools"
    GOBIN="$tools" go install "github.com/fullstorydev/grpcurl/cmd/grpcurl@$GRPCURL_VERSION"
    say "grpcurl is in $tools"
  fi
fi
say "done"
