"""PageTide for llama-cpp-python.

    import logging, pagetide_llama_cpp as pt
    llama = pt.open_llama("model.gguf", n_ctx=4096)
    connector = pt.attach(llama, router="127.0.0.1:7070")
    llama("…")                      # as ever; connector.last says what was reused, and why not more
"""

from pagetide_llama_cpp.cache import PageTideCache
from pagetide_llama_cpp.connector import Connector, attach
from pagetide_llama_cpp.identity import Refused
from pagetide_llama_cpp.opening import open_llama
from pagetide_llama_cpp.options import Options, Report

__all__ = ["Connector", "Options", "PageTideCache", "Refused", "Report", "attach", "open_llama"]
