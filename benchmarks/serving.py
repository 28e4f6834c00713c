"""What HTTP adds to the engine: the same requests through `bem serve` and straight to `bem.Engine`.

    python benchmarks/serving.py                            # bem-tiny; writes benchmarks/results/serving.md
    python benchmarks/serving.py --base smollm2-135m --new 16

Clients run in a process of their own, so many at once, each sending its next request when its answer is
there. CPU seconds are those of the process that serves, all of its threads: other programs on the same cores
hardly disturb them, and what HTTP takes on a second core counts in full. Times that a client sees are by the
wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bem.serving.client import Client  # noqa: E402

CLIENTS = (1, 8, 32)


def prompts(n: int, tokens: int, seed: int) -> list[list[int]]:
    """Random tokens, of which no two prompts have many in common."""
    import random

    draw = random.Random(seed)
    return [[draw.randrange(3, 4000) for _ in range(tokens)] for _ in range(n)]


def shared(queue: list[Any], work: Any, clients: int) -> None:
    """Have so many threads take from a queue until it is empty."""

    def run() -> None:
        while True:
            try:
                item = queue.pop()
            except IndexError:
                return
            work(item)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def load(url: str, clients: int, n: int, tokens: int, new: int, seed: int, streams: bool) -> None:
    """Be the clients; prints what they saw as JSON."""
    client = Client(url)
    first: list[float] = []
    between: list[float] = []

    def ask(prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        began = time.perf_counter()
        if not streams:
            client.post("/v1/completions", body)
            return
        times = [time.perf_counter() for _ in client.stream("/v1/completions", body)]
        first.append(times[0] - began)
        between.extend(b - a for a, b in pairwise(times))

    shared(prompts(n, tokens, seed), ask, clients)
    print(json.dumps({"first": first, "between": between}))


def through_http(server: Any, arguments: list[Any]) -> tuple[float, float, dict[str, list[float]]]:
    """(CPU seconds, seconds, what the clients saw)."""
    command = [sys.executable, __file__, "--load", server.url, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    cpu, began = time.process_time(), time.perf_counter()
    said = process.communicate()[0]
    if process.returncode:
        sys.exit("the clients failed")
    return time.process_time() - cpu, time.perf_counter() - began, json.loads(said)


def straight(engine: Any, clients: int, n: int, tokens: int, new: int, seed: int) -> float:
    """CPU seconds of the same requests without HTTP, so many at once."""
    from bem.engine.request import Request

    waiting = prompts(n, tokens, seed)
    cpu, running = time.process_time(), 0
    while waiting or running:
        while waiting and running < clients:
            engine.submit(Request(waiting.pop(), max_new_tokens=new, ignore_eos=True))
            running += 1
        running -= len(engine.step().finished)
    return time.process_time() - cpu


def row(
    server: Any, engine: Any, clients: int, options: argparse.Namespace, round_: int
) -> dict[str, Any]:
    """One load, both ways, in an order that changes from round to round."""
    n, seed = max(16, 2 * clients), 1000 * clients + round_
    arguments = [clients, n, options.tokens, options.new, seed]
    found: dict[str, Any] = {}
    arms = ["engine", "stream", "whole"]
    for arm in arms[round_ % 3 :] + arms[: round_ % 3]:
        if arm == "engine":
            found[arm] = straight(engine, *arguments)
        else:
            found[arm], _, seen = through_http(server, [*arguments, int(arm == "stream")])
            if arm == "stream":
                found |= seen
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="bem-tiny")
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    import torch

    import bem
    from bem.config import ServingConfig
    from bem.serving.server import Server

    torch.set_num_threads(1)
    base = bem.load_base(options.base)
    server = Server(ServingConfig(base=options.base, port=0, slots=32, cache_gib=0), base).start()
    engine = bem.Engine(bem.load_base(options.base)[0], base[1], slots=32, cache_gib=0)
    straight(engine, 1, 1, 16, 4, 0)
    lines = []
    for clients in CLIENTS:
        rounds = [row(server, engine, clients, options, i) for i in range(options.rounds)]
        lines.append(said(clients, rounds, options.new))
        print(lines[-1], flush=True)
    server.stop()
    name = "serving.md" if options.base == "bem-tiny" else f"serving_{options.base}.md"
    (options.out or ROOT / "benchmarks" / "results" / name).write_text(page(options, lines))


def said(clients: int, rounds: list[dict[str, Any]], new: int) -> str:
    """A line of the table."""
    n = max(16, 2 * clients)
    rate = n * new / statistics.median(r["engine"] for r in rounds)
    more = [
        100 * (statistics.median(r[arm] / r["engine"] for r in rounds) - 1)
        for arm in ("stream", "whole")
    ]
    each = [
        1e3 * statistics.median((r[arm] - r["engine"]) / n for r in rounds)
        for arm in ("stream", "whole")
    ]
    first = sorted(t for r in rounds for t in r["first"])
    between = sorted(t for r in rounds for t in r["between"])
    seen = [_quantiles(first), _quantiles(between)]
    return (
        f"| {clients} | {rate:.0f} | {more[0]:+.1f} % | {each[0]:.1f} | {more[1]:+.1f} % | {each[1]:.1f} | "
        f"{seen[0]} | {seen[1]} |"
    )


def _quantiles(times: list[float]) -> str:
    at = [1e3 * times[min(int(share * len(times)), len(times) - 1)] for share in (0.5, 0.95)]
    return f"{at[0]:.0f} / {at[1]:.0f}"


def page(options: argparse.Namespace, lines: list[str]) -> str:
    head = [
        "# Serving: what HTTP adds to the engine\n",
        f"`python benchmarks/serving.py --base {options.base} --tokens {options.tokens} --new {options.new} "
        f"--rounds {options.rounds}`\n",
        f"{options.base}, bare, float32, one torch thread; prompts of {options.tokens} tokens without anything in "
        f"common, {options.new} new ones. Rates and what is added: CPU seconds of the process that serves, medians of "
        f"{options.rounds} rounds. What clients see: wall clock, on a machine that did other things too.\n",
        "| clients | engine alone, tokens a CPU second | HTTP adds, streamed | ms a request | HTTP adds, whole | ms a request | "
        "first token p50 / p95, ms | between p50 / p95, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(sys.argv[2], *map(int, sys.argv[3:8]), bool(int(sys.argv[8])))
    else:
        main()
