"""llama-cpp-python's own OpenAI-compatible server, with PageTide.

    python -m pagetide_llama_cpp.server --pagetide-router 127.0.0.1:7070 --model model.gguf --n_ctx 4096 …

All other arguments are the server's. Two things differ from it: models get contexts that can give out
pages, and logits_all is False unless it is asked for (reused tokens have no logits). Needs
llama-cpp-python[server].
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from llama_cpp.server import model as server_model

from pagetide_llama_cpp.connector import attach
from pagetide_llama_cpp.opening import contexts_with_pages
from pagetide_llama_cpp.options import Options


def install(router: str, options: Options = Options()) -> None:
    """Models that the server loads from now on are attached. Its LlamaProxy knows ram and disk caches only,
    so the one place where it loads a model is replaced."""
    original = server_model.LlamaProxy.load_llama_from_model_settings

    def load(settings: Any) -> Any:
        if "logits_all" not in settings.model_fields_set:
            settings = settings.model_copy(update={"logits_all": False})
        with contexts_with_pages():
            llama = original(settings)
        attach(llama, router, options)
        return llama

    setattr(server_model.LlamaProxy, "load_llama_from_model_settings", staticmethod(load))


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--pagetide-router", required=True)
    own, rest = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:%(name)s: %(message)s")
    install(own.pagetide_router)
    sys.argv[1:] = rest
    from llama_cpp.server import __main__ as server
    entry: Any = server.main
    entry()


if __name__ == "__main__":
    main()
