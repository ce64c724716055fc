#!/usr/bin/env python3
"""Chat, retrieval and agent prompts with a real model: time to first token without PageTide and with it, in one
process, in another one, after a restart of everything, and on another worker. A table and a plot.

    tests/connectors/llama_cpp/run.sh scenes [--plot FILE.svg] [--json FILE] [--scenes chat,rag,agent] [--threads N]

Words are those of licences on this machine and of this repository's own pages. How the prompts grow is taken from
public traces: a conversation of Mooncake's (FAST25), and an agent's session of kv-cache-tester with a tenth of its
tokens. In front of every prompt the engine's context is emptied: another user had it. Ends with exit code 1
when more than one answer of a scene differs from that without PageTide, or too little was reused.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from engine import open_engine
from fleet import Fleet

import pagetide_llama_cpp as pt
from scene_plot import write_plot

LICENSES = pathlib.Path("/usr/share/common-licenses")
ROOT = pathlib.Path(__file__).resolve().parents[3]
MODEL = pathlib.Path(os.environ.get("PAGETIDE_LLAMA_MODEL", ""))
N_CTX = 4096
ANSWER_TOKENS = 8
POOL = "512MiB"

# Tokens of a prompt, turn by turn.
CHAT_TURNS = (1341, 1661, 1881, 2179, 2296)
AGENT_STEPS = (1656, 2062, 2198, 2254, 2301)
AGENT_TOOLS = 1574  # tools and system prompt, of each of them
RAG_SYSTEM, RAG_DOCUMENT = 180, 1000
QUESTIONS = ["What does this permit?", "Who is bound by it, and since when?", "Sum it up in a sentence."]


def text_of(*paths: pathlib.Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in paths)


class Writer:
    """Prompts made of real words, cut to lengths in tokens."""

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        pages = text_of(*sorted((ROOT / "docs").glob("*.md")))
        self.manual = self._tokens(pages)
        self.licenses = {name: self._tokens(text_of(LICENSES / name)) for name in ("GPL-3", "Apache-2.0")}

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self._llama.tokenize(text.encode(), add_bos=False, special=False)
        return tokens

    def turn(self, role: str, body: list[int], end: bool = True) -> list[int]:
        words = f"<start_of_turn>{role}\n"
        tokens: list[int] = self._llama.tokenize(words.encode(), add_bos=False, special=True) + body
        if end:
            tokens += self._llama.tokenize(b"<end_of_turn>\n", add_bos=False, special=True)
        return tokens

    def growing(self, begin: list[int], words: list[int], lengths: tuple[int, ...]) -> list[list[int]]:
        """Each prompt is the one before, and some more turns."""
        prompts: list[list[int]] = []
        prompt, used, role = begin, 0, "user"
        for length in lengths:
            body = max(length - len(prompt) - len(self.turn(role, [])), 4)
            prompt = prompt + self.turn(role, words[used:used + body])
            used += body
            role = "model" if role == "user" else "user"
            prompts.append(prompt)
        return prompts

    def scenes(self) -> dict[str, list[list[int]]]:
        bos = [self._llama.token_bos()]
        rag = []
        system = bos + self.turn("user", self.manual[-RAG_SYSTEM:])
        for document in self.licenses.values():
            for question in QUESTIONS:
                rag.append(system + self.turn("user", document[:RAG_DOCUMENT] + self._tokens(question)) +
                           self.turn("model", [], end=False))
        return {
            "chat": self.growing(bos, self.licenses["GPL-3"], CHAT_TURNS),
            "rag": rag,
            "agent": self.growing(bos + self.turn("user", self.manual[:AGENT_TOOLS]),
                                  self.manual[AGENT_TOOLS:], AGENT_STEPS),
        }


def ask(llama: Any, connector: Any, prompt: list[int]) -> dict[str, Any]:
    llama.reset()
    llama.input_ids[:] = -1
    began = time.monotonic()
    tokens = llama.generate(prompt, temp=0.0)
    answer = [next(tokens)]
    seconds = time.monotonic() - began
    answer += [next(tokens) for _ in range(ANSWER_TOKENS - 1)]
    loaded = connector.last.loaded_tokens if connector is not None else 0
    return {"seconds": seconds, "loaded": loaded, "tokens": len(prompt), "answer": answer}


def child() -> None:
    """A process with an engine: {router, scenes, passes, threads} on stdin, what each pass found on stdout."""
    order = json.load(sys.stdin)
    llama = open_engine(MODEL, n_ctx=N_CTX, n_threads=order["threads"], n_threads_batch=order["threads"])
    connector = pt.attach(llama, router=order["router"]) if order["router"] else None
    if connector is not None and connector.refused_because:
        raise SystemExit(f"scenes: {connector.refused_because}")
    passes = []
    for _ in range(order["passes"]):
        passes.append({name: [ask(llama, connector, prompt) for prompt in prompts]
                       for name, prompts in order["scenes"].items()})
        if connector is not None:
            connector.flush(60)
    if connector is not None:
        connector.detach()
    print(json.dumps({"passes": passes, "workers": connector.last.worker_id if connector else ""}))


def in_a_process(what: str, router: str, scenes: dict[str, Any], threads: int,
                 passes: int = 1) -> list[dict[str, Any]]:
    print(f"  {what} …", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--child"], stdout=subprocess.PIPE, text=True, timeout=3600, check=False,
        input=json.dumps({"router": router, "scenes": scenes, "passes": passes,
                          "threads": threads}))
    if done.returncode != 0:
        raise SystemExit(f"scenes: the process for {what} ended with {done.returncode}")
    report = json.loads(done.stdout.splitlines()[-1])
    found: list[dict[str, Any]] = report["passes"]
    return found


def measure(scenes: dict[str, Any], threads: int, folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Condition → scene → what each prompt took."""
    runs: dict[str, dict[str, Any]] = {}
    runs["without PageTide"], = in_a_process("without PageTide", "", scenes, threads)
    fleet = Fleet(folder, pool=POOL)
    try:
        runs["first time"], runs["again"] = in_a_process("one process, twice", fleet.router.grpc, scenes,
                                                        threads, 2)
        runs["another process"], = in_a_process("another process", fleet.router.grpc, scenes, threads)
        for program in (*fleet.workers, fleet.router, fleet.store):
            code = program.terminate()
            if code != 0:
                raise SystemExit(f"scenes: {program.log.name} ended with {code}")
    finally:
        fleet.close()
    fleet = Fleet(folder, pool=POOL)
    try:
        runs["after a restart"], = in_a_process("after a restart of everything", fleet.router.grpc, scenes, threads)
        other = fleet.start_worker("w1")
        fleet.workers[0].terminate()
        runs["another worker"], = in_a_process("another worker", fleet.router.grpc, scenes, threads)
        fleet.workers = [other]
    finally:
        fleet.close()
    return runs


def table(runs: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the table, and what is wrong with them."""
    rows, wrong = [], []
    for scene, plain in runs["without PageTide"].items():
        base = sum(p["seconds"] for p in plain)
        for condition, found in runs.items():
            asked = found[scene]
            same = sum(a["answer"] == b["answer"] for a, b in zip(asked, plain))
            row = {"scene": scene, "condition": condition, "prompts": len(asked),
                   "tokens": sum(p["tokens"] for p in asked), "reused": sum(p["loaded"] for p in asked),
                   "seconds": sum(p["seconds"] for p in asked), "same_answers": same}
            row["faster"] = base / row["seconds"]
            rows.append(row)
            if condition not in ("without PageTide", "first time") and row["reused"] < row["tokens"] // 2:
                wrong.append(f"{scene}, {condition}: {row['reused']} of {row['tokens']} tokens reused")
            # A tie between two words may fall the other way by last bits (run.sh real compares these).
            if len(asked) - same > 1:
                wrong.append(f"{scene}, {condition}: {len(asked) - same} of {len(asked)} answers differ")
    return rows, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--scenes", default="chat,rag,agent")
    parser.add_argument("--threads", type=int, default=2, help="of the engine (default 2)")
    parser.add_argument("--plot", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    if options.child:
        child()
        return 0
    tokenizer = open_engine(MODEL, n_ctx=512)
    written = Writer(tokenizer).scenes()
    tokenizer.close()
    names = options.scenes.split(",")
    unknown = set(names) - set(written)
    if unknown:
        parser.error(f"no scenes {sorted(unknown)}: there are {sorted(written)}")
    with tempfile.TemporaryDirectory(prefix="pt-scenes-") as folder:
        runs = measure({name: written[name] for name in names}, options.threads,
                       pathlib.Path(folder))
    rows, wrong = table(runs)
    print(f"{'scene':6} {'':17} {'prompts':>7} {'tokens':>7} {'reused':>7} {'first tokens, s':>16} {'faster':>7} "
          f"{'same answers':>13}")
    for row in rows:
        print(f"{row['scene']:6} {row['condition']:17} {row['prompts']:7} {row['tokens']:7} {row['reused']:7} "
              f"{row['seconds']:16.2f} {row['faster']:6.1f}x {row['same_answers']:6} of {row['prompts']:3}")
    if options.plot:
        write_plot(rows, options.plot)
        print(f"plot: {options.plot}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    for line in wrong:
        print(f"WRONG: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
