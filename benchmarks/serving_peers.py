"""The same load through HTTP on several servers: ours, ours while a canary runs, `transformers serve`, llama.cpp's.

    python benchmarks/serving_peers.py --base smollm2-135m [--gguf FILE]      # writes benchmarks/results/serving_peers.md

Clients run in a process of their own and send texts of a like length to /v1/completions, streamed and greedy; none begin
alike, all answers have the same number of tokens. Each server is a process of its own with one torch thread. Rates are
by its CPU seconds, all threads and children, so that other programs on the same cores hardly disturb them; medians of the
rounds, which take the servers in turn, behind a warm-up of each. Times that a client sees are by the wall clock. A server
that is not installed is left out, and the page says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from bem.serving.client import Client  # noqa: E402
from benchmarks.serving import shared  # noqa: E402

TEXT = "the value of a file that this function returns when its name is a list of numbers"
WORDS = TEXT.split()


class Peer:
    """A server as a process."""

    def __init__(self, name: str, command: list[str], body: dict[str, Any], ready: str):
        """
        Args:
            command: PORT stands for the port.
            body: of a request, beside its prompt.
            ready: path that answers once it is up.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name, self.body, self.ready = name, body, ready
        self.url = f"http://127.0.0.1:{self.port}"
        command = [word.replace("PORT", str(self.port)) for word in command]
        self.log = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=self.log)

    def wait(self) -> str:
        """Until it answers; returns why it never will."""
        while not self._answers(self.ready):
            if self.process.poll() is not None:
                last = Path(self.log.name).read_text().strip().splitlines()[-1:]
                return f"{self.name} ended while it started: {' '.join(last)[:300]}"
            time.sleep(0.5)
        return ""

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.url + path, timeout=60):
                return True
        except OSError:
            return False

    def cpu(self) -> float:
        """CPU seconds so far, children included."""
        root = psutil.Process(self.process.pid)
        times = [p.cpu_times() for p in (root, *root.children(recursive=True))]
        return sum(t.user + t.system for t in times)

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def prompts(n: int, words: int, seed: int) -> list[str]:
    """Texts of which no two begin alike."""
    draw = random.Random(seed)
    return [" ".join([str(draw.random()), *draw.choices(WORDS, k=words)]) for _ in range(n)]


def load(url: str, body: dict[str, Any], clients: int, n: int, words: int, seed: int) -> None:
    """Be the clients; prints what they saw as JSON."""
    client, first, tokens = Client(url), [], []

    def ask(prompt: str) -> None:
        began, pieces = time.perf_counter(), 0
        for _ in client.stream("/v1/completions", {"prompt": prompt, **body}):
            if not pieces:
                first.append(time.perf_counter() - began)
            pieces += 1
        tokens.append(pieces)

    shared(prompts(n, words, seed), ask, clients)
    print(json.dumps({"first": first, "pieces": sum(tokens)}))


def measured(peer: Peer, clients: int, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One load on one server."""
    n = max(8, 2 * clients)
    arguments = [peer.url, json.dumps(peer.body), clients, n, options.words, seed]
    command = [sys.executable, __file__, "--load", *map(str, arguments)]
    before, began = peer.cpu(), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the clients of {peer.name} failed")
    seen = json.loads(done.stdout)
    return {
        "rate": n * options.new / (peer.cpu() - before),
        "first": seen["first"],
        "wall": n * options.new / (time.perf_counter() - began),
    }


def peers(options: argparse.Namespace, home: Path) -> tuple[list[Peer], list[str]]:
    """Those that can be started here, and why not the others."""
    from bem.bases.load import find_base  # not where the clients run: it loads torch

    new, missing = options.new, []
    body = {"max_tokens": new, "temperature": 0}
    python, folder = [sys.executable, "-m"], str(find_base(options.base))
    serve = [*python, "bem", "serve", "--base", options.base, "--port", "PORT", "--set", "slots=32"]
    made = [Peer("ours", [*serve, "--store", str(home / "none")], {**body, "ignore_eos": True}, "/ready")]  # fmt: skip
    if options.canary:
        from benchmarks.faults.serving_kills import two_versions

        second = two_versions(home)[1]
        store = [*serve, "--store", str(home / "store")]
        asked = {**body, "ignore_eos": True}
        made.append(Peer("ours, routed", store, asked, "/ready"))
        canary = [*store, "--canary", f"{second}=0.1"]
        made.append(Peer("ours, routed, 10 % to a canary", canary, asked, "/ready"))
    generation = {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "pad_token_id": 0,
    }
    theirs = {"model": folder, "max_tokens": new, "generation_config": json.dumps(generation)}
    command = [str(Path(sys.executable).parent / "transformers"), "serve", folder, "--port", "PORT", "--host", "127.0.0.1",
               "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    batching = ["--continuous-batching", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512"]
    made.append(Peer("transformers serve, continuous batching", [*command, *batching], theirs, "/health"))  # fmt: skip
    if options.gguf is None or find_spec("llama_cpp") is None:
        missing.append(
            "llama.cpp's server: llama-cpp-python[server] or a GGUF of this base is not here"
        )
    else:
        command = [*python, "llama_cpp.server", "--model", str(options.gguf), "--port", "PORT", "--n_threads", "1", "--n_threads_batch", "1"]  # fmt: skip
        bias = {"logit_bias": {"2": -100}}
        made.append(Peer("llama.cpp's (Q4_1)", command, {**body, **bias}, "/v1/models"))
    return made, missing


def main() -> None:
    """Start, warm, measure in turn, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="bem-tiny")
    parser.add_argument("--gguf", type=Path, help="of the same base, for llama.cpp")
    parser.add_argument("--words", type=int, default=64, help="of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--canary", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/serving_peers.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        servers, missing = peers(options, Path(home))
        try:
            missing += filter(None, [peer.wait() for peer in servers])
            servers = [peer for peer in servers if peer.process.poll() is None]
            for peer in servers:
                measured(peer, 8, argparse.Namespace(words=8, new=2), 0)
            lines = [row for clients in options.clients for row in rows(servers, clients, options)]
        finally:
            for peer in servers:
                peer.end()
    options.out.write_text(page(options, lines, missing), encoding="utf-8")
    print(page(options, lines, missing))


def rows(servers: list[Peer], clients: int, options: argparse.Namespace) -> list[str]:
    """Lines of the table for so many clients."""
    found: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in servers}
    for round_ in range(options.rounds):
        turn = round_ % len(servers)
        for peer in servers[turn:] + servers[:turn]:
            found[peer.name].append(measured(peer, clients, options, 100 * clients + round_))
    lines = []
    for name, rounds in found.items():
        first = sorted(1000 * t for r in rounds for t in r["first"])
        rates = [r["rate"] for r in rounds]
        lines.append(
            f"| {clients} | {name} | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | "
            f"{statistics.median(r['wall'] for r in rounds):.1f} | {first[len(first) // 2]:.0f} | "
            f"{first[min(int(0.95 * len(first)), len(first) - 1)]:.0f} |"
        )
    return lines


def page(options: argparse.Namespace, lines: list[str], missing: list[str]) -> str:
    given = f"--base {options.base} --words {options.words} --new {options.new} --rounds {options.rounds} "
    given += f"--clients {' '.join(map(str, options.clients))}" + (
        f" --gguf {options.gguf.name}" if options.gguf else ""
    )
    head = [
        "# Servers side by side\n",
        f"`python benchmarks/serving_peers.py {given}`\n",
        f"{options.base}, float32, one torch thread each; texts of {options.words} words that begin differently, {options.new} new "
        "tokens, streamed. The routed ones have two experts that act in every chunk of 16 tokens.\n",
        "| clients | server | tokens a CPU second, median (range) | tokens a second by the clock | first token p50, ms | p95 |",
        "|---|---|---|---|---|---|",
    ]
    left = [f"\nLeft out: {why}." for why in missing]
    return "\n".join([*head, *lines, *left]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(sys.argv[2], json.loads(sys.argv[3]), *map(int, sys.argv[4:8]))
    else:
        main()
