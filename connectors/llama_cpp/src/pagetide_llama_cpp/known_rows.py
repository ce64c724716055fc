"""Which tokens made the rows of a context."""

from __future__ import annotations

from typing import Any

import llama_cpp.llama_cpp as lc
import numpy as np
import numpy.typing as npt

from pagetide_llama_cpp.watch import Watch


class KnownRows:
    """The tokens that are known to have made the context's leading rows: they went through eval(), or were loaded,
    and nobody touched the rows since. Inputs that are not tokens (images) and states that are put into the
    context go past us, and leave in the wrapper's input_ids what stood there before. For the thread that
    uses the context."""

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        self._tokens = np.empty(0, np.intc)
        self._watch = Watch(llama.ctx, lc.llama_get_memory(llama.ctx), self.cut)

    def close(self) -> None:
        self._watch.close()

    def cut(self, length: int) -> None:
        """Rows from `length` on are not known any more."""
        self._tokens = self._tokens[:length]

    def set(self, tokens: Any) -> None:
        """The context has rows of these, and no others."""
        self._tokens = np.array(tokens, np.intc)

    def tokens(self) -> npt.NDArray[np.intc]:
        """As far as the wrapper agrees."""
        n = min(self._llama.n_tokens, self._tokens.size)
        return self._tokens[:common_prefix(self._llama.input_ids[:n], self._tokens[:n])]

    def evaluate(self, evaluate: Any, tokens: Any) -> None:
        """evaluate(tokens), the wrapper's own eval()."""
        begin = self._llama.n_tokens
        # Behind rows that went past us nothing is known: what they attended to is not.
        is_known = self.tokens().size == begin
        try:
            evaluate(tokens)
        finally:  # of one that failed some batches may have been decoded
            # It dropped the rows from `begin` on, which was seen; nobody else may have gone further meanwhile.
            if is_known and self._tokens.size == begin:
                self.set(self._llama.input_ids[:self._llama.n_tokens])


def common_prefix(held: Any, tokens: Any) -> int:
    n = min(len(held), len(tokens))
    differs = np.nonzero(np.asarray(held[:n]) != np.asarray(tokens[:n]))[0]
    return int(differs[0]) if differs.size else n
