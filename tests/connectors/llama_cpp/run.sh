#!/usr/bin/env bash
# Runs the llama.cpp connector's tests and measurements with a real llama.cpp (and a real model), against the
# programs of a build. Not part of the CI: the first run builds llama.cpp and fetches the model.
#
#   tests/connectors/llama_cpp/run.sh [--build DIR] [test|real|ttft|scenes] [arguments]
#     test   pytest with tiny models of random weights: all KV types, sliding windows, bad input, killed
#            workers, the wrapper's cache interface, its OpenAI-compatible server (default)
#     real   logits of prompts with the real model: cold, warm, another process, restart, against a control
#     ttft   time to first token, cold and warm, against the baselines
#     scenes chat, retrieval and agent prompts: a table and a plot (deploy/quickstart.sh --engine llama.cpp)
set -euo pipefail
cd "$(dirname "$0")/../../.."

build=build
if [ "${1:-}" = --build ]; then
  build=$2
  shift 2
fi
what=${1:-test}
[ $# -eq 0 ] || shift
if [ "$what" = test ]; then settings=$(deploy/setup_llama_cpp.sh --no-model); else settings=$(deploy/setup_llama_cpp.sh); fi
eval "$settings"
export PAGETIDE_LLAMA_MODEL=${PAGETIDE_LLAMA_MODEL:-}
# Programs of another build may be named by PAGETIDE_BIN.
export PAGETIDE_BIN=${PAGETIDE_BIN:-$PWD/$build/bin}
# A build makes it where the system's Python has grpcio and protobuf; where it does not, one that was made here is of
# the sources as they were then.
made=$build/python/pagetide/sync/__init__.py
if [ ! -f "$made" ] || [ -n "$(find clients/python proto -type f -newer "$made" -print -quit)" ]; then
  "$PAGETIDE_LLAMA_PYTHON" clients/python/generate.py "$build/python" --package
fi
export PYTHONPATH=$PWD/$build/python:$PWD/connectors/llama_cpp/src:$PWD/tests/clients/python
export PYTHONDONTWRITEBYTECODE=1
here=tests/connectors/llama_cpp
case "$what" in
  test) exec "$PAGETIDE_LLAMA_PYTHON" -m pytest -q -p no:cacheprovider "$here"/{connector,first_token,numerics,store_thread,lease,fork,foreign_calls,window,bad_input,kill,cache,export,server}_test.py \
    "$@" ;;
  real) exec "$PAGETIDE_LLAMA_PYTHON" "$here/real_model.py" "$@" ;;
  scenes) exec "$PAGETIDE_LLAMA_PYTHON" "$here/scenes.py" "$@" ;;
  ttft) exec "$PAGETIDE_LLAMA_PYTHON" "$here/ttft.py" "$@" ;;
  *) echo "run.sh: unknown command '$what'" >&2; exit 2 ;;
esac
