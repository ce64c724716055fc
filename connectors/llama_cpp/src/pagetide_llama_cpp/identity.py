"""The model that a llama.cpp context computes, as PageTide names it: everything that decides which KV rows
mean the same thing. Contexts that differ in any of it never share a page."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import llama_cpp.llama_cpp as lc

import pagetide
from pagetide.v1 import model_pb2
from pagetide_llama_cpp.gguf import GgufFile, read_gguf
from pagetide_llama_cpp.state import StateLayout
from pagetide_llama_cpp.watch import FileState, file_of, origin_of

PAGE_TOKENS = 256

_DATA_TYPES = {  # ggml's numbers
    0: model_pb2.DATA_TYPE_F32, 1: model_pb2.DATA_TYPE_F16, 2: model_pb2.DATA_TYPE_Q4_0,
    3: model_pb2.DATA_TYPE_Q4_1, 6: model_pb2.DATA_TYPE_Q5_0, 7: model_pb2.DATA_TYPE_Q5_1,
    8: model_pb2.DATA_TYPE_Q8_0, 20: model_pb2.DATA_TYPE_IQ4_NL, 30: model_pb2.DATA_TYPE_BF16,
}
_PLAIN_TYPES = (0, 1, 30)
# One full layer in so many, the last of each run: llama.cpp's default where the file states no pattern.
_WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6}


class Refused(Exception):
    """This context cannot reuse pages; the text says why."""


def check_context(llama: Any) -> None:
    """Refused unless pages can be cut out of the context and put back bit-exactly."""
    params, model = llama.context_params, llama.model
    if lc.llama_model_is_recurrent(model) or lc.llama_model_is_hybrid(model):
        raise Refused("recurrent or hybrid model: its state cannot be cut into pages")
    if lc.llama_model_has_encoder(model):
        raise Refused("encoder model: its rows do not depend on preceding tokens alone")
    if int(params.attention_type) == lc.LLAMA_ATTENTION_TYPE_NON_CAUSAL:
        raise Refused("attention that is not causal: rows depend on later tokens")
    if params.embeddings:
        raise Refused("embedding context: no tokens are generated")
    if not params.kv_unified or params.n_seq_max < 2:
        raise Refused(f"kv_unified = {bool(params.kv_unified)}, n_seq_max = {params.n_seq_max}: pages pass "
                      "through a second sequence of a unified cache; open the model with open_llama")
    if lc.llama_model_n_swa(model) > 0 and not params.swa_full:
        raise Refused(f"sliding window of {lc.llama_model_n_swa(model)} tokens with swa_full = False: rows "
                      "that the next token attends to are dropped; open the model with swa_full = True")
    if llama._logits_all:  # noqa: SLF001
        raise Refused("logits_all (or a draft model): reused tokens have no logits")
    origin = origin_of(llama.ctx)
    # The wrapper itself sets the adapter that it was opened with.
    if origin.num_changes > (1 if llama.lora_path else 0):
        raise Refused(f"{origin.last_change} was called on the context: what changes its rows cannot be named")


def read_loaded_gguf(llama: Any, path: str) -> GgufFile:
    """The file that a model was loaded from. Refused where another one may have its name by now."""
    before = FileState.of(path)
    gguf = read_gguf(path)
    loaded = file_of(llama.model) if path == llama.model_path else None
    if FileState.of(path) != before or loaded not in (None, before):
        raise Refused(f"{path} has changed since the model was loaded from it")
    return gguf


def model_spec(llama: Any, gguf: GgufFile, layout: StateLayout, numerics: str = "") -> model_pb2.ModelSpec:
    """Refused for what is not known well enough to be named. numerics: digest of what moves last bits, to be part
    of the key; empty: pages are shared with engines that differ in it."""
    params = llama.context_params
    if gguf.of_architecture("attention.causal", True) is False:
        raise Refused(f"{gguf.architecture}: attention that is not causal")
    rotated = _rotated(gguf, params, origin_of(llama.ctx).rotation)
    groups = []
    for body, layers in zip(layout.bodies, _layers_of_bodies(llama, gguf, layout)):
        heads, k_dim, v_dim = _heads(gguf)
        if body.k_type not in _DATA_TYPES or body.v_type not in _DATA_TYPES:
            raise Refused(f"KV types {body.k_type} and {body.v_type} of ggml are not known")
        k_bytes = pagetide.row_bytes(_DATA_TYPES[body.k_type], heads, k_dim)
        v_bytes = pagetide.row_bytes(_DATA_TYPES[body.v_type], heads, v_dim)
        if (body.k_row_bytes, body.v_row_bytes) != (k_bytes, v_bytes):
            raise Refused(f"rows of {body.k_row_bytes} and {body.v_row_bytes} bytes in the context, of "
                          f"{k_bytes} and {v_bytes} by the file: layers differ")
        is_window = body is not layout.bodies[0]
        groups.append(model_pb2.LayerGroup(
            # Window layers keep all their rows under swa_full, so they page like full ones.
            kind=model_pb2.LayerGroup.KIND_FULL, layers=layers, k_type=_DATA_TYPES[body.k_type],
            v_type=_DATA_TYPES[body.v_type], kv_heads=heads, k_dim=k_dim, v_dim=v_dim,
            rope=_rope(llama, gguf, k_dim, is_window),
            basis=(model_pb2.LayerGroup.BASIS_HADAMARD if any(rotated) else
                   model_pb2.LayerGroup.BASIS_PLAIN)))
    settings = hashlib.sha256(settings_text(llama, gguf, rotated).encode()).hexdigest()[:32]
    spec = model_pb2.ModelSpec(
        weights_digest=gguf.weights_digest, tokenizer_digest=gguf.tokenizer_digest,
        adapter_digests=_adapters(llama), vocabulary_size=llama.n_vocab(),
        numerics_id="-".join(filter(None, ("llama.cpp", settings, numerics))),
        geometry=model_pb2.Geometry(page_tokens=PAGE_TOKENS, groups=groups))
    title = str(gguf.metadata.get("general.name") or gguf.architecture).lower()
    slug = re.sub(r"[^a-z0-9]+", "-", title).strip("-")[:48] or "model"
    # A name belongs to one digest; the rest of the identity is in the suffix.
    spec.name = f"{slug}-{hashlib.sha256(spec.SerializeToString(deterministic=True)).hexdigest()[:12]}"
    return spec


def settings_text(llama: Any, gguf: GgufFile, rotated: tuple[bool, bool]) -> str:
    """Settings of the context that change rows, by more than last bits."""
    p = llama.context_params
    values = {
        "flash_attn_type": int(p.flash_attn_type),
        "attention_type": int(p.attention_type),
        "rope_scaling_type": int(p.rope_scaling_type),
        "rope_freq_base": float(p.rope_freq_base), "rope_freq_scale": float(p.rope_freq_scale),
        "yarn": [float(p.yarn_ext_factor), float(p.yarn_attn_factor), float(p.yarn_beta_fast),
                 float(p.yarn_beta_slow), int(p.yarn_orig_ctx)],
        "rotated_k_v": rotated,
        "kv_overrides": llama.kv_overrides or {},
        # LongRoPE chooses its factors by the size of the context.
        "n_ctx": llama.n_ctx() if "rope_factors_long.weight" in gguf.tensors else 0,
    }
    return json.dumps(values, sort_keys=True)


def _rotated(gguf: GgufFile, params: Any, setting: str) -> tuple[bool, bool]:
    """Whether K and V are stored in a Hadamard-rotated basis (llama-kv-cache.cpp, attn_rot_k and _v). setting: of
    LLAMA_ATTN_ROT_DISABLE when the context was made."""
    digits = re.match(r"\s*[+-]?\d+", setting)  # as C's atoi reads it
    disabled = digits is not None and int(digits[0]) != 0
    _, k_dim, v_dim = _heads(gguf)
    return (not disabled and params.type_k not in _PLAIN_TYPES and k_dim % 64 == 0,
            not disabled and params.type_v not in _PLAIN_TYPES and v_dim % 64 == 0)


def _heads(gguf: GgufFile) -> tuple[int, int, int]:
    """KV heads, elements of a K head and of a V head."""
    query_heads = gguf.of_architecture("attention.head_count")
    heads = gguf.of_architecture("attention.head_count_kv", query_heads)
    if not isinstance(heads, int) or not isinstance(query_heads, int) or heads < 1:
        raise Refused(f"{gguf.architecture}: {heads} KV heads: layers differ")
    width = gguf.of_architecture("embedding_length", 0)
    k_dim = gguf.of_architecture("attention.key_length", width // query_heads)
    return heads, k_dim, gguf.of_architecture("attention.value_length", width // query_heads)


def _layers_of_bodies(llama: Any, gguf: GgufFile, layout: StateLayout) -> list[list[int]]:
    """Which layers each cache of the context holds."""
    num_layers = int(gguf.of_architecture("block_count", 0))
    if len(layout.bodies) == 1:
        if lc.llama_model_n_swa(llama.model) > 0:
            raise Refused(f"{gguf.architecture}: all layers in one cache with a sliding window")
        if layout.bodies[0].num_layers != num_layers:
            raise Refused(f"{gguf.architecture}: {layout.bodies[0].num_layers} of {num_layers} layers "
                          "have KV rows")
        return [list(range(num_layers))]
    pattern = gguf.of_architecture("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        windows = [bool(w) for w in pattern[:num_layers]]
    elif gguf.architecture in _WINDOW_PERIOD:
        period = pattern or _WINDOW_PERIOD[gguf.architecture]
        windows = [layer % period < period - 1 for layer in range(num_layers)]
    else:
        raise Refused(f"{gguf.architecture}: which of its layers have a window is not known here")
    split = [[i for i in range(num_layers) if windows[i] == w] for w in (False, True)]
    if [len(s) for s in split] != [b.num_layers for b in layout.bodies]:
        raise Refused(f"{gguf.architecture}: {[len(s) for s in split]} full and window layers by the file, "
                      f"{[b.num_layers for b in layout.bodies]} in the context")
    return split


def _rope(llama: Any, gguf: GgufFile, k_dim: int, is_window: bool) -> model_pb2.Rope:
    """Rotations of K, for those who shift rows. Equality of identities does not rest on this alone:
    settings_text carries the context's settings and the weights digest the file's."""
    style = {0: model_pb2.Rope.STYLE_NORM, 2: model_pb2.Rope.STYLE_NEOX}.get(
        int(lc.llama_model_rope_type(llama.model)), model_pb2.Rope.STYLE_NONE)
    if style == model_pb2.Rope.STYLE_NONE:
        return model_pb2.Rope(style=style)
    params = llama.context_params
    kinds = {-1: gguf.of_architecture("rope.scaling.type", "none"), 0: "none", 1: "linear"}
    scaling = kinds.get(params.rope_scaling_type, "another")
    if scaling not in ("none", "linear"):
        raise Refused(f"{gguf.architecture}: RoPE scaling \"{scaling}\" is not described here yet")
    base = params.rope_freq_base or gguf.of_architecture("rope.freq_base", 10000.0)
    scale = params.rope_freq_scale or lc.llama_model_rope_freq_scale_train(llama.model) or 1.0
    if is_window:  # window layers have a base of their own and are not scaled
        base, scale = gguf.of_architecture("rope.freq_base_swa", 10000.0), 1.0
    return model_pb2.Rope(
        style=style, n_rot=gguf.of_architecture("rope.dimension_count", k_dim), base=base, scale=scale,
        scaling=model_pb2.Rope.SCALING_NONE if scale == 1.0 else model_pb2.Rope.SCALING_LINEAR,
        factors=gguf.floats("rope_freqs.weight"), position_components=1)


def _adapters(llama: Any) -> list[bytes]:
    if not llama.lora_path:
        return []
    digest = hashlib.sha256()
    with open(llama.lora_path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    digest.update(repr(float(llama.lora_scale)).encode())
    return [digest.digest()]
