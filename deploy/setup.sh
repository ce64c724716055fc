#!/usr/bin/env bash
# Installs what a fresh Debian 12 machine lacks to build, test and run PageTide. Idempotent: what is
# there is left alone, and nothing is asked of the network when nothing is missing.
#
#   deploy/setup.sh [--checks] [--grpcurl] [--cuda] [--nccl]
#     --checks   also clang 14, clang-tidy and clang-format (thread-safety build, CI)
#     --grpcurl  also grpcurl, built by Go into build/tools/
#     --cuda     also the CUDA 13.0 compiler and runtime and a disassembler, from PyPI into
#                build/tools/cuda, unless nvcc is on the PATH or in /usr/local/cuda; no driver, no
#                GPU needed
#     --nccl     also NCCL, from PyPI into build/tools/nccl, unless the loader knows libnccl.so.2 already;
#                PageTide looks for it when it runs (LD_LIBRARY_PATH=build/tools/nccl for programs,
#                tests look there by themselves), and needs neither it nor a GPU to be built
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
  # the Python client and its tests
  python3-grpcio python3-protobuf python3-numpy python3-pytest
)
with_grpcurl=false
with_cuda=false
with_nccl=false
for argument in "$@"; do
  case "$argument" in
    --checks) packages+=(clang-14 clang-tidy-14 clang-format-14) ;;
    --grpcurl) with_grpcurl=true ;;
    --cuda) with_cuda=true ;;
    --nccl) with_nccl=true ;;
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
if $with_cuda; then
  venv="$PWD/build/tools/cuda"
  if command -v nvcc > /dev/null || [ -x /usr/local/cuda/bin/nvcc ] ||
     compgen -G "$venv/lib/python3*/site-packages/nvidia/cu13/lib64/libcudart.so" > /dev/null; then
    say "the CUDA compiler is there"
  else
    install_missing python3-venv
    say "installing the CUDA 13.0 compiler and runtime"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check \
      "nvidia-cuda-nvcc==13.0.*" "nvidia-cuda-crt==13.0.*" "nvidia-nvvm==13.0.*" \
      "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-cccl==13.0.*" \
      "nvidia-cuda-cuobjdump==13.2.*" "nvidia-cuda-nvdisasm==13.2.*"  # the first on PyPI
    # Where nvcc's profile and CMake look: the packages have neither lib64 nor unversioned names.
    toolkit="$(echo "$venv"/lib/python3*/site-packages/nvidia/cu13)"
    ln -sfn libcudart.so.13 "$toolkit/lib/libcudart.so"
    ln -sfn lib "$toolkit/lib64"
    say "nvcc is in $toolkit/bin; the cuda preset finds it there"
  fi
fi
if $with_nccl; then
  tools="$PWD/build/tools"
  # All of its output first: a reader that stops early would make the loader's list fail.
  known="$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p)"
  if [ -e "$tools/nccl/libnccl.so.2" ] || grep -q 'libnccl\.so\.2 ' <<< "$known"; then
    say "NCCL is there"
  else
    install_missing python3-pip
    say "installing NCCL"
    mkdir -p "$tools/nccl"
    # A folder of its own, not an environment: nothing but the library is wanted.
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --root-user-action=ignore \
      --target "$tools/nccl" "nvidia-nccl-cu13==2.*"
    ln -sfn nvidia/nccl/lib/libnccl.so.2 "$tools/nccl/libnccl.so.2"
    say "libnccl.so.2 is in $tools/nccl"
  fi
fi
say "done"
