"""A real server on a real socket, in a thread, and versions for its store."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from openai import OpenAI

import bem
from bem.config import ServingConfig
from bem.engine.engine import Engine
from bem.engine.request import Request, Sampling
from bem.experts.expert import Update, from_updates
from bem.runs.loading import attach_release
from bem.runs.release import read_content
from bem.runs.store import Store
from bem.serving.server import Server
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import FREE, expert
from tests.runs.contents import make_grounds

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}"
    "{% else %}User: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def base():
    """(model, tokenizer) of a random micro Llama that chats."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return make_llama(), tokenizer


@contextmanager
def served(store: Path | None = None, **options):
    """A server that answers."""
    settings = {"port": 0, "watch_s": 0.05, "slots": 4, "max_new_tokens": 64, **options}
    server = Server(ServingConfig(store=None if store is None else str(store), **settings), base())
    server.start()
    try:
        yield server
    finally:
        server.stop()


def client(server: Server, key: str = "none", **options) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, **{"max_retries": 0, **options})


def add_adapter(store: Path, home: Path, seed: int, promote: bool = True):
    """A static adapter that changes the answers, in a store: its release."""
    attached = bem.attach(make_llama(), "s0", rank=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return _put(attached, store, home, f"adapter-{seed}", promote)


def add_router(store: Path, home: Path, promote: bool = True, seeds=(0, 1, 2)):
    """A router over the experts a, b and c, which change the answers."""
    model = make_llama()
    experts = [_loud(expert(model, *each)) for each in zip("abc", (4, 4, 2), seeds, strict=True)]
    made = bem.mount(model, experts, **FREE)
    made.router.trained = True
    return _put(made, store, home, f"router-{seeds[2]}", promote)


def _loud(quiet):
    updates = {site: Update(30 * update.u, update.v) for site, update in quiet.updates.items()}
    return from_updates(quiet.name, updates, "test")


def _put(adapted, store: Path, home: Path, name: str, promote: bool):
    content = read_content(adapted.save(home / name))
    home.mkdir(exist_ok=True)
    kept = Store(store)
    return kept.promote(content, make_grounds(home, name)) if promote else kept.add(content, name)


def fresh_engine(server: Server, version: str) -> Engine:
    """An engine of its own, for a version by its digest, that never saw a request."""
    model, tokenizer = base()
    if version == server.serving.residents.bare.version:
        return Engine(model, tokenizer, slots=1, cache_gib=0)
    store = server.serving.residents.store
    adapted = attach_release(store, store.find(version), model)
    return Engine(adapted, tokenizer, slots=1, cache_gib=0)


def replayed(server: Server, version: str, prompt, new: int, seed: int, **fields) -> str:
    """The text that a fresh engine gives on that version."""
    fields.setdefault("sampling", Sampling(temperature=1.0, seed=seed))
    engine = fresh_engine(server, version)
    return engine.generate([Request(prompt, max_new_tokens=new, **fields)])[0].text
