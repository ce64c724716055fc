#!/usr/bin/env python3
"""Makes sequence states with the real llama.cpp, from tiny models with random weights.

    pip install llama-cpp-python==0.3.30 gguf     # 0.3.30: version 2 of the file; 0.3.36: version 3
    make_llama_cpp_states.py OUTPUT_DIR

For each case it writes PREFIX_v<version>_<case>.{ggsq,mem}: the file of llama_state_seq_save_file
and the bytes of llama_state_seq_get_data of the same sequence. It also loads both back with
llama.cpp and compares the logits of the next token, so that what is committed is known to be good.
"""

import ctypes
import os
import pathlib
import struct
import sys
import tempfile

import gguf
import numpy
import llama_cpp.llama_cpp as ll

EMBEDDING, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, VOCABULARY = 64, 2, 1, 32, 64, 64


def write_model(path, arch, layers):
    """A random decoder: `arch` is "llama" (full attention) or "gemma3" (every sixth layer full)."""
    random = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(256)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    if arch == "gemma3":
        writer.add_sliding_window(8)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")

    def add(name, *shape):
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        writer.add_tensor(name, (random.standard_normal(shape) * scale).astype(numpy.float32))

    add("token_embd.weight", VOCABULARY, EMBEDDING)
    add("output_norm.weight", EMBEDDING)
    add("output.weight", VOCABULARY, EMBEDDING)
    for i in range(layers):
        at = f"blk.{i}."
        add(at + "attn_norm.weight", EMBEDDING)
        add(at + "attn_q.weight", HEADS * HEAD_DIM, EMBEDDING)
        add(at + "attn_k.weight", KV_HEADS * HEAD_DIM, EMBEDDING)
        add(at + "attn_v.weight", KV_HEADS * HEAD_DIM, EMBEDDING)
        add(at + "attn_output.weight", EMBEDDING, HEADS * HEAD_DIM)
        if arch == "gemma3":
            add(at + "post_attention_norm.weight", EMBEDDING)
            add(at + "attn_k_norm.weight", HEAD_DIM)
            add(at + "attn_q_norm.weight", HEAD_DIM)
            add(at + "post_ffw_norm.weight", EMBEDDING)
        add(at + "ffn_norm.weight", EMBEDDING)
        add(at + "ffn_gate.weight", FEED_FORWARD, EMBEDDING)
        add(at + "ffn_up.weight", FEED_FORWARD, EMBEDDING)
        add(at + "ffn_down.weight", EMBEDDING, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def new_context(model, flash, type_k, type_v, unified):
    params = ll.llama_context_default_params()
    params.n_ctx = 256 if unified else 512
    params.n_batch = params.n_ubatch = 64
    params.n_seq_max = 2
    params.n_threads = params.n_threads_batch = 1
    params.type_k, params.type_v = type_k, type_v
    params.flash_attn_type = 1 if flash else 0
    params.kv_unified = unified
    params.swa_full = False
    context = ll.llama_init_from_model(model, params)
    assert context
    return context


def decode(context, tokens, first, sequence):
    batch = ll.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i] = token
        batch.pos[i] = first + i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
        batch.logits[i] = i == len(tokens) - 1
    assert ll.llama_decode(context, batch) == 0
    ll.llama_batch_free(batch)
    logits = ll.llama_get_logits_ith(context, -1)
    return numpy.ctypeslib.as_array(logits, (VOCABULARY,)).copy()


def main():
    output = pathlib.Path(sys.argv[1])
    ll.llama_backend_init()
    F16, Q8_0, BF16 = 1, 8, 30
    cases = [
        # name, architecture, layers, flash attention, K, V, unified
        ("full_transposed", "llama", 2, False, F16, F16, True),
        ("full_plain", "llama", 2, True, F16, F16, True),
        ("full_streams", "llama", 2, True, BF16, F16, False),
        ("full_q8_0", "llama", 2, True, Q8_0, Q8_0, True),
        ("iswa", "gemma3", 6, True, F16, F16, True),
        ("iswa_transposed", "gemma3", 6, False, F16, F16, True),
    ]
    tokens = [(7 * i + 3) % VOCABULARY for i in range(20)]
    sequence = 1
    # Rows as computed, not rotated: the format does not say which they are.
    os.environ["LLAMA_ATTN_ROT_DISABLE"] = "1"
    for name, arch, layers, flash, type_k, type_v, unified in cases:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.gguf")
            write_model(path, arch, layers)
            params = ll.llama_model_default_params()
            params.n_gpu_layers = 0
            params.use_mmap = False
            model = ll.llama_model_load_from_file(path.encode(), params)
            assert model
        make = lambda: new_context(model, flash, type_k, type_v, unified)
        context = make()
        decode(context, tokens, 0, sequence)
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        file = output / "state.tmp"
        written = ll.llama_state_seq_save_file(
            context, str(file).encode(), sequence, array, len(tokens))
        assert written == file.stat().st_size > 0
        version = struct.unpack_from("<I", file.read_bytes(), 4)[0]
        prefix = f"llama_cpp_v{version}_{name}"
        file = file.rename(output / f"{prefix}.ggsq")
        size = ll.llama_state_seq_get_size(context, sequence)
        memory = (ctypes.c_uint8 * size)()
        assert ll.llama_state_seq_get_data(context, memory, size, sequence) == size
        (output / f"{prefix}.mem").write_bytes(bytes(memory))
        expected = decode(context, [5], len(tokens), sequence)

        for form in ("ggsq", "mem"):
            other = make()
            if form == "ggsq":
                count = ctypes.c_size_t()
                got = ll.llama_state_seq_load_file(
                    other, str(file).encode(), sequence, array, len(tokens), ctypes.byref(count))
                assert got == file.stat().st_size and count.value == len(tokens)
            else:
                assert ll.llama_state_seq_set_data(other, memory, size, sequence) == size
            difference = abs(decode(other, [5], len(tokens), sequence) - expected).max()
            print(f"{prefix}.{form}: {file.stat().st_size if form == 'ggsq' else size} bytes, "
                  f"logits differ by {difference}")
            assert difference < 1e-3
            ll.llama_free(other)
        ll.llama_free(context)
        ll.llama_model_free(model)


if __name__ == "__main__":
    main()
