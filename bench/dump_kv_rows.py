#!/usr/bin/env python3
"""KV rows of a real model as raw bytes, for page_codec_bench: llama.cpp's state of one sequence over a text.

    eval "$(deploy/setup_llama_cpp.sh)"
    $PAGETIDE_LLAMA_PYTHON bench/dump_kv_rows.py --kv f16 --tokens 2048 --out rows.bin

The rows of a layer lie one behind the other, K, then V (flash attention keeps V as it is written); the few header bytes between
layers do not matter for what is measured.
"""

import argparse
import ctypes
import os
import pathlib

import llama_cpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv", choices=["f16", "f32", "bf16", "q8_0", "q4_0"], default="f16")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--text", type=pathlib.Path, default=pathlib.Path("/usr/share/common-licenses/GPL-3"))
    parser.add_argument("--model", default=os.environ.get("PAGETIDE_LLAMA_MODEL"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    kv_type = getattr(llama_cpp, f"GGML_TYPE_{args.kv.upper()}")
    llama = llama_cpp.Llama(args.model, n_ctx=args.tokens + 8, type_k=kv_type, type_v=kv_type, flash_attn=True,
                            swa_full=True, verbose=False, n_threads=2)
    llama.eval(llama.tokenize(args.text.read_bytes())[:args.tokens])
    context = llama._ctx.ctx
    size = llama_cpp.llama_state_seq_get_size(context, 0)
    buffer = (ctypes.c_uint8 * size)()
    written = llama_cpp.llama_state_seq_get_data(context, buffer, size, 0)
    args.out.write_bytes(bytes(buffer)[:written])
    print(f"{args.out}: {written} bytes, {llama.n_tokens} tokens")


if __name__ == "__main__":
    main()
