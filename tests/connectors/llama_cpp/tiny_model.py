"""A GGUF model of random weights: small enough that a prompt of a thousand tokens takes a moment, shaped as
the real ones are. Written by gguf, the package of llama.cpp's authors."""

from __future__ import annotations

import pathlib

import gguf
import numpy as np

VOCABULARY = 300
HEADS, KV_HEADS, HEAD_DIM, WIDTH, FEED_FORWARD = 4, 2, 64, 256, 512


def write_tiny_model(path: pathlib.Path, architecture: str = "llama", layers: int = 4, seed: int = 1,
                     window: int = 0, freq_base: float = 10000.0, name: str = "tiny", word: str = "word",
                     weights: type = np.float16) -> pathlib.Path:
    """architecture "llama" (plain) or "gemma3" (every sixth layer full, the others with a window). word: of
    the tokenizer's pieces. weights: float16 or float32, of the same values."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name(name)
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(freq_base)
    writer.add_vocab_size(VOCABULARY)
    if window:
        writer.add_sliding_window(window)
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    pieces += [f"{word}{i}" for i in range(VOCABULARY - len(pieces))]
    kinds += [gguf.TokenType.NORMAL] * (VOCABULARY - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(VOCABULARY)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(tensor: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns)) / np.sqrt(columns)
        writer.add_tensor(tensor, values.astype(np.float16).astype(weights))

    def norm(tensor: str, size: int) -> None:
        writer.add_tensor(tensor, (1 + 0.1 * rng.standard_normal(size)).astype(np.float32))

    matrix("token_embd.weight", VOCABULARY, WIDTH)
    norm("output_norm.weight", WIDTH)
    if architecture == "llama":
        matrix("output.weight", VOCABULARY, WIDTH)
    for layer in range(layers):
        block = f"blk.{layer}."
        norm(block + "attn_norm.weight", WIDTH)
        matrix(block + "attn_q.weight", HEADS * HEAD_DIM, WIDTH)
        matrix(block + "attn_k.weight", KV_HEADS * HEAD_DIM, WIDTH)
        matrix(block + "attn_v.weight", KV_HEADS * HEAD_DIM, WIDTH)
        matrix(block + "attn_output.weight", WIDTH, HEADS * HEAD_DIM)
        norm(block + "ffn_norm.weight", WIDTH)
        matrix(block + "ffn_gate.weight", FEED_FORWARD, WIDTH)
        matrix(block + "ffn_up.weight", FEED_FORWARD, WIDTH)
        matrix(block + "ffn_down.weight", WIDTH, FEED_FORWARD)
        if architecture == "gemma3":
            for extra in ("post_attention_norm", "post_ffw_norm"):
                norm(f"{block}{extra}.weight", WIDTH)
            norm(block + "attn_q_norm.weight", HEAD_DIM)
            norm(block + "attn_k_norm.weight", HEAD_DIM)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_adapter(path: pathlib.Path, rank: int = 4, seed: int = 1) -> pathlib.Path:
    """A LoRA adapter for the K projection of the first layer of a tiny "llama"."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for part, shape in (("a", (rank, WIDTH)), ("b", (KV_HEADS * HEAD_DIM, rank))):
        writer.add_tensor(f"blk.0.attn_k.weight.lora_{part}",
                          (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
