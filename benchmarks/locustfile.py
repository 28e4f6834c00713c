"""A load test with locust (https://locust.io): people who chat, of whom some read along and some say what they think.

    bem serve --feedback runs/feedback.db &
    locust -f benchmarks/locustfile.py --headless -u 8 -r 4 -t 60s -H http://127.0.0.1:8080 --page benchmarks/results/locust.md

Each conversation has up to four turns, so that later ones find the chunks of those before. A streamed answer is
two entries: the time to its first token, and to its last. 429 and 503 are no failures if they say when to come again.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from locust import HttpUser, between, events, task

TEXT = "the value of a file that this function returns when its name is a list of numbers"
WORDS = TEXT.split()


class Talker(HttpUser):
    """One person."""

    wait_time = between(0.1, 0.5)

    def on_start(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.last: str | None = None

    def asked(self, **more: Any) -> dict[str, Any]:
        if len(self.messages) >= 8:
            self.messages = []
        text = " ".join(random.choices(WORDS, k=random.randrange(6, 30)))
        self.messages.append({"role": "user", "content": text})
        return {"messages": self.messages, "max_tokens": 16, **more}

    def heard(self, text: str, id: str) -> None:
        self.messages.append({"role": "assistant", "content": text})
        self.last = id

    @task(3)
    def whole(self) -> None:
        """An answer in one piece."""
        body = self.asked()
        with self.client.post("/v1/chat/completions", json=body, catch_response=True) as response:
            if self.refused(response):
                return
            answer = response.json()
            self.heard(answer["choices"][0]["message"]["content"] or "", answer["id"])

    @task(3)
    def streamed(self) -> None:
        """An answer that is read along."""
        body, began, name = (
            self.asked(stream=True),
            time.perf_counter(),
            "/v1/chat/completions streamed",
        )
        with self.client.post("/v1/chat/completions", json=body, stream=True, name=name,
                              catch_response=True) as response:  # fmt: skip
            if self.refused(response):
                return
            pieces = []
            for line in response.iter_lines():
                data = line.decode().removeprefix("data: ")
                if data in ("", "[DONE]"):
                    continue
                if not pieces:
                    self.first_token(began)
                pieces.append(json.loads(data))
            if not pieces or "error" in pieces[-1]:
                response.failure(f"broke off: {pieces[-1:]}")
                return
            said = [p["choices"][0]["delta"].get("content") or "" for p in pieces if p["choices"]]
            self.heard("".join(said), pieces[0]["id"])

    @task(1)
    def feedback(self) -> None:
        """What is thought of the last answer."""
        if self.last is not None:
            said = {"request": self.last, "kind": "score", "score": random.random()}
            self.client.post("/v1/feedback", json=said)

    def first_token(self, began: float) -> None:
        self.environment.events.request.fire(
            request_type="SSE", name="first token", response_time=1000 * (time.perf_counter() - began),
            response_length=0, exception=None, context={},
        )  # fmt: skip

    def refused(self, response: Any) -> bool:
        """Was it turned away, politely? Then it is asked again later."""
        if response.status_code == 200:
            return False
        self.messages.pop()
        if response.status_code in (429, 503) and "retry-after" in response.headers:
            response.success()
            time.sleep(min(int(response.headers["retry-after"]), 5))
        else:
            response.failure(f"{response.status_code}: {response.text[:200]}")
        return True


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    parser.add_argument("--page", default="", help="Where to write what was measured, as Markdown.")


@events.quitting.add_listener
def _write(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    if not getattr(options, "page", ""):
        return
    head = (
        "# A load test with locust\n\n"
        f"`locust -f benchmarks/locustfile.py --headless -u {options.num_users} -r {options.spawn_rate:g} "
        f"-t {options.run_time}s -H {options.host}`, on a machine that did other things too: times by the clock.\n\n"
        "| | requests | failures | a second | p50 ms | p95 ms | largest ms |\n|---|---|---|---|---|---|---|\n"
    )
    lines = [
        f"| {stats.method} {stats.name} | {stats.num_requests} | {stats.num_failures} | {stats.total_rps:.2f} | "
        f"{stats.get_response_time_percentile(0.5):.0f} | {stats.get_response_time_percentile(0.95):.0f} | "
        f"{stats.max_response_time:.0f} |\n"
        for stats in sorted(environment.stats.entries.values(), key=lambda s: s.name)
    ]
    errors = [f"- {e.occurrences} times {e.error}\n" for e in environment.stats.errors.values()]
    Path(options.page).write_text(head + "".join(lines) + "\n" * bool(errors) + "".join(errors))
