"""llama-cpp-python's own server with the connector: started twice against one PageTide, the second does not
compute what the first computed. A real HTTP client, real processes."""

from __future__ import annotations

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import Any

from fleet import Fleet
from tiny_model import write_tiny_model

import pagetide


class Server:
    def __init__(self, model: pathlib.Path, router: str, log: pathlib.Path) -> None:
        with socket.socket() as free:  # the server takes a number, not a socket
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        with open(log, "wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pagetide_llama_cpp.server", "--pagetide-router", router,
                 "--model", str(model), "--n_ctx", "2048", "--n_threads", "2", "--port", str(self.port),
                 "--host", "127.0.0.1", "--verbose", "False"],
                stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)

    def complete(self, prompt: str) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", headers={"Content-Type": "application/json"},
            data=json.dumps({"prompt": prompt, "max_tokens": 4, "temperature": 0}).encode())
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def reports(self) -> list[tuple[int, int]]:
        """(tokens loaded from PageTide, tokens that it offered) of each prompt, by the engine's log."""
        found = re.findall(r"tokens: \d+ live, (\d+) loaded, (\d+) offered", self.log.read_text())
        return [(int(loaded), int(offered)) for loaded, offered in found]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)


def worker_stat(fleet: Fleet, name: str) -> int:
    with pagetide.Client(router=fleet.router.grpc) as client:
        return int(client.connect_worker(fleet.workers[0].grpc).stats()[name])


def test_the_second_server_never_computes_the_firsts_prefix() -> None:
    with tempfile.TemporaryDirectory(prefix="pt-server-") as name:
        folder = pathlib.Path(name)
        model = write_tiny_model(folder / "tiny.gguf")
        prompt = "a long system prompt, " * 30  # over 600 tokens: most bytes are tokens of their own
        fleet = Fleet(folder, pool="64MiB")
        try:
            first = Server(model, fleet.router.grpc, folder / "first.log")
            answer = first.complete(prompt + "first")
            assert first.reports() == [(0, 0)]
            full_pages = answer["usage"]["prompt_tokens"] // 256 * 256
            assert full_pages >= 512
            deadline = time.monotonic() + 20
            while worker_stat(fleet, "pagetide_worker_tokens_appended_total") < full_pages:
                assert time.monotonic() < deadline, first.log.read_text()
                time.sleep(0.05)
            first.stop()
            second = Server(model, fleet.router.grpc, folder / "second.log")
            again = second.complete(prompt + "first")
            other = second.complete(prompt + "another question")
            assert again["choices"][0]["text"] == answer["choices"][0]["text"]
            assert again["usage"] == answer["usage"] and other["choices"]
            reports = second.reports()
            assert reports[0][0] == full_pages, second.log.read_text()[-2000:]
            # The second prompt finds the prefix in the context, which is nearer.
            assert len(reports) == 2 and reports[1][0] == 0
            # What the engine was offered is what the worker says it gave.
            assert sum(offered for _, offered in reports) == worker_stat(
                fleet, "pagetide_worker_tokens_reused_total")
            second.stop()
        finally:
            fleet.close()
