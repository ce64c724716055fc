"""Engines for the connector's tests: one opened with PageTide, one without as the control."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any, Mapping, Optional

import llama_cpp.llama_cpp as lc
import numpy as np

import pagetide_llama_cpp as pt

SETTINGS: dict[str, Any] = dict(
    n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=2, n_threads_batch=2, verbose=False)


def open_engine(path: pathlib.Path, **arguments: Any) -> Any:
    return pt.open_llama(str(path), **{**SETTINGS, **arguments})


def logits_of(llama: Any) -> np.ndarray:
    """Logits of the last evaluated token."""
    pointer = lc.llama_get_logits_ith(llama.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)).copy()


def first_logits(llama: Any, prompt: list[int]) -> np.ndarray:
    """Logits from which the first token after a prompt is chosen, by way of generate()."""
    next(llama.generate(prompt, temp=0.0))
    return logits_of(llama)


def control_logits(llama: Any, written: Optional[list[int]], prompt: list[int],
                   reused: int) -> np.ndarray:
    """The same without PageTide, with the same split: a fresh context evaluates `written` (the prompt whose
    pages were reused), drops what differs, and evaluates the rest of `prompt`."""
    lc.llama_memory_clear(lc.llama_get_memory(llama.ctx), True)
    llama.reset()
    if written is not None and reused:
        llama.eval(written)
        lc.llama_memory_seq_rm(lc.llama_get_memory(llama.ctx), 0, reused, -1)
        llama.n_tokens = reused
    llama.eval(prompt[llama.n_tokens:])
    return logits_of(llama)


def ask_in_a_process(order: dict[str, Any], environment: Optional[Mapping[str, str]] = None) -> dict[str, Any]:
    """The report of main() below, in a new process."""
    done = subprocess.run([sys.executable, __file__], input=json.dumps(order), capture_output=True, text=True,
                          timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def main() -> None:
    """A process of its own: {model, router, arguments, prompt, out} on stdin; a report on stdout, the logits
    in the file `out`."""
    order = json.load(sys.stdin)
    llama = open_engine(pathlib.Path(order["model"]), **order["arguments"])
    connector = pt.attach(llama, router=order["router"])
    np.save(order["out"], first_logits(llama, order["prompt"]))
    connector.detach()
    assert connector.last is not None
    print(json.dumps({
        "loaded": connector.last.loaded_tokens, "reason": connector.last.reason,
        "stored": connector.stored_tokens, "refused": connector.refused_because}))


if __name__ == "__main__":
    main()
