#!/usr/bin/env python3
"""Logits of prompts with a real model, bit by bit: PageTide cold, warm, in another process and after a restart of
everything, against a control without PageTide (the same split into batches, the same threads, swa_full).

    tests/connectors/llama_cpp/run.sh real [--prompts N] [--phase cold|warm|all] [--flash-attn]
                                           [--kv f16|q8_0] [--threads N] [--json FILE]

Cold: every prompt by itself, with a PageTide that is emptied in front of it. Warm: the texts that the prompts
begin with are stored, then every prompt is asked in an emptied context. Prompts are licence texts of the
system with questions behind them, chat turns, and edits in the middle. Ends with a page in which one byte is
wrong: it must show. Exit code 1 when anything differs that must not.
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

import numpy as np
from engine import first_logits, logits_of, open_engine
from fleet import Fleet

import pagetide
import pagetide_llama_cpp as pt
from pagetide.v1 import admin_pb2

LICENSES = pathlib.Path("/usr/share/common-licenses")
TEXTS = ["GPL-3", "Apache-2.0", "LGPL-2.1", "MPL-2.0", "GFDL-1.3"]
QUESTIONS = ["What does this text permit?", "Who wrote it, and when?", "Sum it up in a sentence.",
             "Which duties has a distributor?"]
TURNS = ["Tell me more.", "Why is that so?", "And what if I do not?"]
PAGE = 256
BASE_TOKENS = 700
MODEL = pathlib.Path(os.environ.get("PAGETIDE_LLAMA_MODEL", ""))
POOL = "512MiB"


def make_prompts(llama: Any, count: int) -> list[dict[str, Any]]:
    """{base: tokens written first, tokens: the prompt, kind}. No prompt fills a page that its base lacks
    before an edit, so that every phase finds the same pages."""
    prompts: list[dict[str, Any]] = []
    room = 3 * PAGE - 1
    for text in TEXTS:
        body = (LICENSES / text).read_text(errors="replace")
        chat = f"<start_of_turn>user\nRead this:\n{body}"
        base = llama.tokenize(chat.encode(), add_bos=True, special=True)[:BASE_TOKENS]
        tails = [("shared prefix", base[:600 + 20 * i], q) for i, q in enumerate(QUESTIONS)]
        tails += [("chat", base, t) for t in TURNS]
        for at in (520, 400, 300):
            edited = base[:at] + llama.tokenize(b" (amended here)", add_bos=False) + base[at:]
            tails.append(("middle edit", edited[:BASE_TOKENS], "What was amended?"))
        for kind, head, question in tails:
            end = f"<end_of_turn>\n<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"
            tokens = (head + llama.tokenize(end.encode(), add_bos=False, special=True))[:room]
            prompts.append({"base": base, "tokens": tokens, "kind": kind, "text": text})
    return prompts[:count]


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def reusable(prompt: dict[str, Any]) -> int:
    """Tokens that the prompt has in common with its base and that the base's full pages hold; the last
    of these pages may be reused in part."""
    full = len(prompt["base"]) // PAGE * PAGE
    return min(common_prefix(prompt["base"], prompt["tokens"]), full)


def run_control(prompts: list[dict[str, Any]], arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of each prompt, and of each base, without PageTide."""
    import llama_cpp.llama_cpp as lc
    llama = open_engine(MODEL, **arguments)
    memory = lc.llama_get_memory(llama.ctx)
    of_prompt: dict[int, np.ndarray] = {}
    of_base = []
    for text in dict.fromkeys(p["text"] for p in prompts):
        mine = [i for i, p in enumerate(prompts) if p["text"] == text]
        lc.llama_memory_clear(memory, True)
        llama.reset()
        llama.eval(prompts[mine[0]]["base"])
        of_base.append(logits_of(llama))
        # What is cut off is gone: the prompts that keep most come first.
        for i in sorted(mine, key=lambda i: -reusable(prompts[i])):
            kept = reusable(prompts[i])
            lc.llama_memory_seq_rm(memory, 0, kept, -1)
            llama.n_tokens = kept
            llama.eval(prompts[i]["tokens"][kept:])
            of_prompt[i] = logits_of(llama)
    return np.stack([of_prompt[i] for i in range(len(prompts))]), np.stack(of_base)


def run_cold_control(prompts: list[dict[str, Any]], arguments: dict[str, Any]) -> tuple[np.ndarray, list[float]]:
    """Logits of each prompt computed whole in an emptied context, and the seconds that took."""
    import llama_cpp.llama_cpp as lc
    llama = open_engine(MODEL, **arguments)
    rows, seconds = [], []
    for prompt in prompts:
        lc.llama_memory_clear(lc.llama_get_memory(llama.ctx), True)
        llama.reset()
        began = time.monotonic()
        rows.append(first_logits(llama, prompt["tokens"]))
        seconds.append(time.monotonic() - began)
    return np.stack(rows), seconds


def run_cold_pagetide(order: dict[str, Any]) -> dict[str, Any]:
    """The same with PageTide, which is asked for each prompt, has nothing, and stores it."""
    llama = open_engine(MODEL, **order["arguments"])
    connector = pt.attach(llama, router=order["router"])
    context = connector._context
    assert context is not None, connector.refused_because
    report: dict[str, Any] = {"loaded": [], "seconds": [], "added": []}
    rows = []
    with pagetide.Client(router=order["router"]) as client:
        worker = client.connect_worker(order["worker"])
        for prompt in order["prompts"]:
            # An open sequence keeps its pages: that of the prompt before ends when another one begins.
            context.clear()
            connector.prepare(prompt["tokens"][:2])
            assert connector.flush(60)
            worker.admin.ClearCache(admin_pb2.ClearCacheRequest(), timeout=30)
            began = time.monotonic()
            rows.append(first_logits(llama, prompt["tokens"]))
            report["seconds"].append(time.monotonic() - began)
            last = connector.last
            assert last is not None
            report["loaded"].append(last.loaded_tokens)
            # By the connector's own clock: one computation of a prompt differs more from the next.
            report["added"].append(last.ask_seconds + last.cut_seconds)
            assert connector.flush(60)
    np.save(order["out"], np.stack(rows))
    connector.detach()
    report["stored"], report["dropped"] = connector.stored_tokens, connector.dropped_tokens
    return report


def run_pagetide(order: dict[str, Any]) -> dict[str, Any]:
    """One process with PageTide: the bases (if asked), then every prompt in an emptied context."""
    prompts = order["prompts"]
    llama = open_engine(MODEL, **order["arguments"])
    report: dict[str, Any] = {"loaded": [], "reasons": [], "plant": None}
    if order["write"]:
        writer = pt.attach(llama, router=order["router"])
        bases = []
        for text in dict.fromkeys(p["text"] for p in prompts):
            base = next(p["base"] for p in prompts if p["text"] == text)
            bases.append(first_logits(llama, base))
        np.save(order["out"] + ".bases.npy", np.stack(bases))
        writer.detach(60)
        report["stored"], report["refused"] = writer.stored_tokens, writer.refused_because
    reader = pt.attach(llama, router=order["router"], options=pt.Options(store=False))
    context = reader._context
    assert context is not None, reader.refused_because
    rows = []
    for prompt in prompts:
        context.clear()
        rows.append(first_logits(llama, prompt["tokens"]))
        assert reader.last is not None
        report["loaded"].append(reader.last.loaded_tokens)
        report["reasons"].append(reader.last.reason)
    np.save(order["out"], np.stack(rows))
    if order["plant"]:
        stage = context.stage

        def with_a_wrong_byte(*arguments: Any) -> Any:
            state = stage(*arguments)
            state[state.size // 2] ^= 0x10
            return state

        context.stage = with_a_wrong_byte  # type: ignore[assignment,method-assign]
        context.clear()
        wrong = first_logits(llama, prompts[0]["tokens"])
        assert reader.last is not None
        report["plant"] = {"loaded": reader.last.loaded_tokens,
                           "differs_by": float(np.abs(wrong - rows[0]).max())}
    reader.detach()
    return report


def in_a_process(order: dict[str, Any]) -> Any:
    done = subprocess.run([sys.executable, __file__, "--child"], input=json.dumps(order),
                          stdout=subprocess.PIPE, text=True, timeout=3600, check=False)
    if done.returncode != 0:
        raise SystemExit(f"real_model: the process for {order['what']} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def child() -> None:
    order = json.load(sys.stdin)
    if order["what"] == "control":
        of_prompt, of_base = run_control(order["prompts"], order["arguments"])
        np.save(order["out"], of_prompt)
        np.save(order["out"] + ".bases.npy", of_base)
        print("{}")
    elif order["what"] == "cold control":
        of_prompt, seconds = run_cold_control(order["prompts"], order["arguments"])
        np.save(order["out"], of_prompt)
        print(json.dumps({"seconds": seconds}))
    elif order["what"] == "cold":
        print(json.dumps(run_cold_pagetide(order)))
    else:
        print(json.dumps(run_pagetide(order)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--phase", choices=["cold", "warm", "all"], default="all")
    parser.add_argument("--flash-attn", action="store_true")
    parser.add_argument("--kv", choices=["f16", "q8_0"], default="f16")
    parser.add_argument("--threads", type=int, default=2, help="of the engine and its control (default 2)")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    if options.child:
        child()
        return 0
    arguments: dict[str, Any] = {"flash_attn": options.flash_attn, "n_threads": options.threads,
                                 "n_threads_batch": options.threads}
    if options.kv == "q8_0":
        arguments["type_k"] = 8
        if options.flash_attn:  # quantised V needs it
            arguments["type_v"] = 8
    tokenizer = open_engine(MODEL, n_ctx=512)
    prompts = make_prompts(tokenizer, options.prompts)
    tokenizer.close()
    failures = 0
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pt-real-") as name:
        folder = pathlib.Path(name)

        def run(what: str, router: str = "", write: bool = False, plant: bool = False,
                worker: str = "") -> Any:
            began = time.monotonic()
            order = dict(what=what, router=router, prompts=prompts, arguments=arguments, write=write,
                         plant=plant, worker=worker, out=str(folder / f"{what}.npy"))
            report = in_a_process(order)
            print(f"  {what}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            return report

        def compare(what: str, expected: np.ndarray, got: np.ndarray, loaded: list[int]) -> None:
            nonlocal failures
            deviation = np.abs(expected - got).max(axis=1)
            same = int((deviation == 0).sum())
            failures += len(got) - same
            results.append({"what": what, "identical": same, "of": len(got),
                            "largest_deviation": float(deviation.max()), "reused_tokens": sum(loaded)})
            print(f"{what:34} {same:3} of {len(got):3} identical   largest deviation "
                  f"{deviation.max():.3g}   reused {sum(loaded)} tokens", flush=True)

        def load(what: str, suffix: str = "") -> np.ndarray:
            array: np.ndarray = np.load(str(folder / f"{what}.npy") + suffix)
            return array

        def cold() -> dict[str, Any]:
            nonlocal failures
            without = run("cold control")
            home = folder / "cold-fleet"
            home.mkdir()
            # Without write-through, so that clearing the worker empties PageTide.
            fleet = Fleet(home, pool=POOL, worker_flags=("--write-through=false",))
            try:
                report: dict[str, Any] = run("cold", fleet.router.grpc, worker=fleet.workers[0].grpc)
            finally:
                fleet.close()
            compare("cold, every prompt by itself", load("cold control"), load("cold"), report["loaded"])
            failures += any(report["loaded"])  # then it was not cold
            share = sum(report["added"]) / (sum(report["seconds"]) - sum(report["added"]))
            print(f"PageTide added {1000 * sum(report['added']) / len(prompts):.1f} ms to "
                  f"{sum(report['seconds']) / len(prompts):.2f} s a cold prompt: {100 * share:.2f} % "
                  f"({report['stored']} tokens stored, {report['dropped']} dropped)", flush=True)
            return {"added_share": share, "seconds": sum(report["seconds"]),
                    "control_seconds": sum(without["seconds"])}

        def warm() -> dict[str, Any]:
            nonlocal failures
            run("control")
            control, bases = load("control"), load("control", ".bases.npy")
            in_a_process(dict(what="control", prompts=prompts, arguments=arguments,
                              out=str(folder / "second.npy")))
            compare("control against control", control, load("second"), [])
            wanted = [reusable(p) for p in prompts]
            fleet = Fleet(folder, pool=POOL)
            try:
                report = run("warm", fleet.router.grpc, write=True)
                if report["refused"]:
                    raise SystemExit(f"real_model: {report['refused']}")
                compare("cold (texts that are stored)", bases, load("warm", ".bases.npy"), [])
                compare("warm, the same process", control, load("warm"), report["loaded"])
                reports = [report, run("another process", fleet.router.grpc, plant=True)]
                compare("warm, another process", control, load("another process"), reports[1]["loaded"])
                for program in (*fleet.workers, fleet.router, fleet.store):
                    assert program.terminate() == 0
            finally:
                fleet.close()
            fleet = Fleet(folder, pool=POOL)
            try:
                reports.append(run("restart", fleet.router.grpc))
                compare("warm, after a restart of all", control, load("restart"), reports[2]["loaded"])
            finally:
                fleet.close()
            for report in reports:
                if report["loaded"] != wanted:
                    failures += 1
                    print(f"reused {report['loaded']}, expected {wanted}: {set(report['reasons'])}")
            plant = reports[1]["plant"]
            print(f"one wrong byte in each of {plant['loaded'] // PAGE} pages: logits differ by "
                  f"{plant['differs_by']:.3g}")
            failures += plant["differs_by"] == 0
            planted: dict[str, Any] = plant
            return planted

        outcome: dict[str, Any] = {}
        if options.phase in ("cold", "all"):
            outcome["cold"] = cold()
        if options.phase in ("warm", "all"):
            outcome["planted"] = warm()
    if options.json:
        options.json.write_text(json.dumps(
            {"arguments": arguments, "results": results, **outcome}, indent=1))
    print("OK" if failures == 0 else f"{failures} FAILED")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
