"""Experts and routers of one seed of an experiment, made once and shared by all arms with a route.

    experts   trained side by side under the maker's route: each turn under the expert of its skill,
              with a shared one beside all of them if `shared_rank` says so
    traces    the training conversations under every expert, and the best path
    ar0       the router cloned from the traces
    ar1       the router improved on generated answers

    runs/NAME/routing/seed-N/   experts/ traces.npz ar0/ ar1/ cloning.json ar1-training/ ...

Every stage is a folder that is written whole, with a key of what it depends on; a second call, or
another process, finds it finished.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bem.adapters.sites import base_hash
from bem.config import ExperimentConfig, RouterConfig, RoutingConfig
from bem.errors import ConfigError, DataError
from bem.experiments.measuring.answers import context_length, quality
from bem.experts.expert import read_expert, write_lora
from bem.experts.stack import fixed_updates
from bem.routing.mount import blank_expert, load_router, mount
from bem.routing.mounted import Mounted
from bem.runs.folder import digest_of, read_json, write_json
from bem.tasks.conversations import skill_of, skills
from bem.tasks.load import Task
from bem.tasks.scoring import score
from bem.training.bc import clone
from bem.training.data import Encoded, Example, data_hash, encode
from bem.training.environment import Environment
from bem.training.fit import STATE, fit
from bem.training.policy_gradient import Iteration, improve
from bem.training.traces import Traces, trace

SHARED = "shared"
OF_THE_STACK = (
    "chunk_size", "router_layer", "orthogonal", "trust_radius", "trust_norm", "trust_relative",
)  # fmt: skip
"""Settings of the router that experts are trained under; the others are the policy's own."""
Say = Callable[[str, int, int, str], None]
"""(stage, done, of, detail)"""


@dataclass(frozen=True)
class Skills:
    """Which expert serves which skill."""

    experts: tuple[str, ...]
    owner: dict[str, int]
    """Skill -> expert option, from 1."""

    def route(self, row: Example) -> list[int]:
        """Expert option of each turn of a row by the skills that its maker gave them."""
        turns = row.meta.get("skills") or [skill_of(row)]
        return [self.owner[skill] for skill in turns]


def skills_of(routing: RoutingConfig, tasks: Sequence[Task]) -> Skills:
    """The experts of a config over the tasks' skills.

    Raises:
        ConfigError: an expert of an unknown skill, or a skill with no expert or with two.
    """
    known = skills(tasks)
    experts = routing.experts or {s.replace("/", "-"): [s] for s in known}
    owner: dict[str, int] = {}
    for option, (name, mine) in enumerate(experts.items(), 1):
        for wanted in mine:
            found = [s for s in known if s == wanted or s.startswith(wanted + "/")]
            if not found:
                raise ConfigError(
                    f"routing.experts.{name}: no skill {wanted!r}. Skills: {', '.join(known)}."
                )
            twice = [s for s in found if s in owner]
            if twice:
                raise ConfigError(f"routing.experts: {twice[0]} belongs to two experts.")
            owner |= {s: option for s in found}
    missing = [s for s in known if s not in owner]
    if missing:
        raise ConfigError(f"routing.experts: nobody serves {', '.join(missing)}.")
    return Skills(tuple(experts), owner)


def routed(rows: Sequence[Example], options: Sequence[list[int]]) -> list[Example]:
    """The rows with a route: one expert option for each turn."""
    return [
        replace(row, meta={**row.meta, "route": list(o)})
        for row, o in zip(rows, options, strict=True)
    ]


class Stages:
    """The stages of one seed, each made when first asked for."""

    def __init__(
        self,
        config: ExperimentConfig,
        folder: Path,
        model: Any,
        tokenizer: Any,
        tasks: Sequence[Task],
        examples: Sequence[Example],
        seed: int,
        say: Say,
    ):
        assert config.routing is not None
        self.config, self.routing, self.seed, self.say = config, config.routing, seed, say
        self.folder = folder / "routing" / f"seed-{seed}"
        self.model, self.tokenizer, self.tasks = model, tokenizer, list(tasks)
        self.examples = list(examples)
        self.skills = skills_of(self.routing, tasks)
        self.pad_id = tokenizer.pad_token_id or 0
        self._by_task = {task.name: task for task in tasks}

    # --- stages -----------------------------------------------------------------------------------

    def experts(self) -> Path:
        """Folder of the trained experts (with a router that knows nothing yet)."""
        return self._stage("experts", self._key("experts"), self._train_experts)

    def ar0(self) -> Path:
        """Folder of the cloned router."""
        return self._stage("ar0", self._key("ar0"), self._clone)

    def ar1(self) -> Path:
        """Folder of the router after policy gradient."""
        return self._stage("ar1", self._key("ar1"), self._improve)

    def peers(self) -> Path:
        """Folder of the same experts as PEFT's methods take them: each with the shared one in it."""
        return self._stage("peer-experts", self._key("experts"), self._fold_shared)

    def _fold_shared(self, folder: Path) -> None:
        with self.mounted(self.experts()) as mounted:
            n = len(self.skills.experts)
            for e, name in enumerate(self.skills.experts):
                gates = torch.zeros(len(mounted.experts))
                gates[e], gates[n:] = 1.0, 1.0  # the shared one, if there is one, stands last
                write_lora(fixed_updates(mounted.stacks, gates), folder / name)

    def _key(self, stage: str) -> str:
        """Everything that a stage depends on, its predecessors included."""
        routing = self.routing.model_dump(mode="json")
        parts: dict[str, Any] = {
            "base": base_hash(self.model),
            "data": data_hash(self.examples),
            "seed": self.seed,
            "training": self.config.training.model_dump(mode="json"),
            "experts": [routing[key] for key in ("experts", "expert_rank", "shared_rank", "steps")],
            "stack": [routing["router"][key] for key in OF_THE_STACK],
        }
        if stage in ("ar0", "ar1"):
            parts["router"], parts["cloning"] = routing["router"], routing["cloning"]
        if stage == "ar1":
            parts["policy_gradient"] = routing["policy_gradient"]
        return digest_of(parts)

    def _stage(self, name: str, key: str, make: Callable[[Path], None]) -> Path:
        folder, mark = self.folder / name, self.folder / f"{name}.json"
        with self._lock():
            if mark.is_file() and read_json(mark)["key"] == key and folder.is_dir():
                return folder
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            write_json(mark, {"key": key})
        return folder

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Another process that needs the same stage waits for it. Reentrant within one process."""
        import fcntl

        if getattr(self, "_held", False):
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def _train_experts(self, folder: Path) -> None:
        layer = self.routing.router.router_layer
        blanks = [
            blank_expert(self.model, name, self._rank(name), layer, about)
            for name, about in self._names().items()
        ]
        mounted = mount(self.model, blanks, self._router_config())
        steps = self.routing.steps or self.config.training.steps
        training = self.config.training.model_copy(update={"steps": steps})
        rows = routed(self.examples, [self.skills.route(row) for row in self.examples])
        work = self.folder / "experts-training"
        try:
            with mounted.training("experts"):
                fit(
                    mounted,
                    self.tokenizer,
                    rows,
                    training,
                    work,
                    self.seed,
                    lambda step: self.say(
                        "training experts", step.step, steps, f"loss {step.loss:.3f}"
                    ),
                    f"experts seed {self.seed}",
                )
            mounted.save(folder, data_hash(self.examples))
        finally:
            self.model = mounted.detach()
        (work / STATE).unlink(missing_ok=True)

    def _names(self) -> dict[str, str]:
        """Every expert, and what it is for; the shared one last."""
        owner = self.skills.owner.items()
        found = {
            name: ", ".join(skill for skill, o in owner if o == option)
            for option, name in enumerate(self.skills.experts, 1)
        }
        return found | ({SHARED: "acts in every chunk"} if self.routing.shared_rank else {})

    def _rank(self, name: str) -> int:
        return self.routing.shared_rank if name == SHARED else self.routing.expert_rank

    def _router_config(self) -> RouterConfig:
        changes: dict[str, Any] = {"seed": self.routing.router.seed + self.seed}
        if self.routing.shared_rank:
            changes["shared"] = SHARED
        return self.routing.router.model_copy(update=changes)

    @contextlib.contextmanager
    def with_new_router(self) -> Iterator[Mounted]:
        """The trained experts under a router that knows nothing yet."""
        folder = self.experts() / "experts"
        experts = [
            replace(read_expert(folder / name, self.model, name), about=about)
            for name, about in self._names().items()
        ]
        mounted = mount(self.model, experts, self._router_config())
        try:
            yield mounted
        finally:
            self.model = mounted.detach()

    def _clone(self, folder: Path) -> None:
        with self.with_new_router() as mounted:
            rows = self.traced_rows()
            encoded = [self.encoded(row) for row in rows]
            traces = self.trace(mounted, encoded, self.folder / "traces.npz")
            result = clone(
                mounted,
                encoded,
                traces,
                self.pad_id,
                self.routing.cloning,
                self.seed,
                self.config.eval_batch_size,
                lambda text: self.say(text, 0, 0, ""),
            )
            mounted.save(folder, data_hash(rows))
        write_json(self.folder / "cloning.json", asdict(result))

    def _improve(self, folder: Path) -> None:
        source, settings = self.ar0(), self.routing.policy_gradient

        def show(found: Iteration) -> None:
            kept = "" if found.accepted else " (step refused)"
            detail = (
                f"reward {found.reward:.3f}, KL {found.kl:.4f}, entropy {found.entropy:.2f}{kept}"
            )
            alarm = f" ALARM: {found.alarm}" if found.alarm else ""
            self.say("policy gradient", found.iteration, settings.iterations, detail + alarm)

        work = self.folder / "ar1-training"
        if (work / "key").is_file() and (work / "key").read_text() != self._key("ar1"):
            shutil.rmtree(work)  # of other experts, or other settings
        work.mkdir(parents=True, exist_ok=True)
        (work / "key").write_text(self._key("ar1"))
        with self.mounted(source) as mounted:
            environment = Environment(
                mounted,
                self.tokenizer,
                self.score,
                settings.reward,
                settings.max_new_tokens,
                settings.batch_size,
            )
            room = self._room(settings.max_new_tokens)
            prompts = [
                encode(row, self.tokenizer, room, with_answer=False) for row in self.examples
            ]
            improve(environment, self.examples, prompts, settings, work, self.seed, show)
            mounted.save(folder, data_hash(self.examples))

    # --- what stages and arms share ---------------------------------------------------------------

    @contextlib.contextmanager
    def mounted(self, folder: Path) -> Iterator[Mounted]:
        """A saved router on the base, taken off again at the end."""
        mounted = load_router(self.model, folder)
        try:
            yield mounted
        finally:
            self.model = mounted.detach()

    def traced_rows(self) -> list[Example]:
        """The training conversations that are traced: a seeded choice."""
        count = min(self.routing.cloning.rows, len(self.examples))
        rng = np.random.default_rng([self.seed, 3])
        chosen = sorted(rng.choice(len(self.examples), count, replace=False).tolist())
        return [self.examples[i] for i in chosen]

    def encoded(self, row: Example) -> Encoded:
        """A whole conversation, answer included, as long as it may be."""
        return encode(row, self.tokenizer, self.room)

    def trace(
        self,
        mounted: Mounted,
        rows: Sequence[Encoded],
        cache: Path | None,
        experts_alone: bool = False,
    ) -> Traces:
        """Every expert's losses on these conversations; see `trace` of training."""
        return trace(
            mounted,
            rows,
            self.pad_id,
            self.routing.cloning,
            self.config.eval_batch_size,
            cache,
            lambda done, of: self.say("tracing", done, of, f"{len(rows)} conversations"),
            experts_alone,
        )

    def score(self, row: Example, answer: str) -> dict[str, float]:
        """What an episode's answer is worth: quality, em, f1, validity; and tool where one is called."""
        task = self._by_task[row.task]
        form = task.form_of(row)
        names = dict.fromkeys(("em", "f1", "validity", task.primary))
        if "loss" in names:
            raise DataError(f"{row.task}: its primary metric is the loss, which no answer has.")
        found = {name: score(name, form, answer, row.references) for name in names}
        found["quality"] = quality(task.primary, found)
        if form == "tool":
            found["tool"] = found["em"]
        return {k: found[k] for k in ("quality", "em", "f1", "validity", "tool") if k in found}

    @property
    def room(self) -> int:
        """Longest conversation in tokens."""
        return self._room(0)

    def _room(self, new_tokens: int) -> int:
        return min(self.config.training.max_length, context_length(self.model) - new_tokens)
