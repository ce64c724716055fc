"""Real programs under test: a store, a router and workers on free ports of loopback."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import threading
import time
from typing import Optional

import pagetide

BIN = pathlib.Path(os.environ.get("PAGETIDE_BIN", "build/bin"))


class Program:
    """One process. It prints "NAME ready key=address …" once it serves; its log is kept in a file."""

    def __init__(self, name: str, log: pathlib.Path, *arguments: str) -> None:
        self.log = log
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [str(BIN / name), "--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", *arguments],
                stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self._process.stdout is not None
        # A program that neither serves nor ends would hold readline for ever.
        watchdog = threading.Timer(30, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        if " ready " not in line:
            self.kill()
            raise RuntimeError(f"{name} did not start: {log.read_text()[-2000:]}")
        self.address: dict[str, str] = dict(re.findall(r"(\w+)=(\S+)", line))

    @property
    def grpc(self) -> str:
        return self.address["grpc"]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=30)

    def terminate(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=60)

    def pause(self) -> None:
        """Returns when all its threads stand still."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)


class Fleet:
    """A store, a router and workers. Everything ends with close()."""

    def __init__(self, folder: pathlib.Path, workers: int = 1, pool: str = "16MiB",
                 model_pool: Optional[str] = None, worker_flags: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self._pool = [f"--pool-bytes={pool}", *worker_flags]
        if model_pool is not None:  # else the first model takes all
            self._pool.append(f"--model-pool-bytes={model_pool}")
        self._programs: list[Program] = []
        self.workers_by_id: dict[str, Program] = {}  # those that were started last
        self.store = self.start_store()
        self.router = self._start("pagetide-router", "router", f"--store={self.store.grpc}")
        self.workers = [self.start_worker(f"w{i}") for i in range(workers)]

    def _start(self, name: str, log: str, *arguments: str) -> Program:
        program = Program(name, self.folder / f"{log}.log", *arguments)
        self._programs.append(program)
        return program

    def start_store(self) -> Program:
        return self._start("pagetide-store", "store", f"--data-dir={self.folder / 'store'}")

    def start_worker(self, worker_id: str, *flags: str) -> Program:
        """Returns when the router knows it, too."""
        program = self._start("pagetide-worker", worker_id, f"--worker-id={worker_id}",
                              f"--store={self.store.grpc}", f"--router={self.router.grpc}",
                              f"--local-socket={self.folder / worker_id}.sock", *self._pool, *flags)
        self.workers_by_id[worker_id] = program
        deadline = time.monotonic() + 60
        with pagetide.Client(router=self.router.grpc) as client:
            while not any(w.address == program.grpc and w.state == "serving"
                          for w in client.list_workers()):
                assert time.monotonic() < deadline, program.log.read_text()[-2000:]
                time.sleep(0.01)
        return program

    def start_shard_group(self, name: str, num_ranks: int = 2) -> list[Program]:
        """A worker a rank, named "NAME-RANK"."""
        return [self.start_shard(name, rank) for rank in range(num_ranks)]

    def start_shard(self, name: str, rank: int) -> Program:
        return self.start_worker(f"{name}-{rank}", f"--shard-group={name}", f"--shard-rank={rank}")

    def close(self) -> None:
        for program in reversed(self._programs):
            program.resume()
            program.kill()
