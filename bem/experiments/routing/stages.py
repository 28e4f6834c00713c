"""Experts and routers of one seed of an experiment, made once and shared by all arms with a route.

    experts   trained side by side under the maker's route: each turn under the expert of its skill,
              with a shared one beside all of them if `shared_rank` says so
    traces    the training conversations under every expert, and the best path
    ar0       the router cloned from the traces
    ar1       the router improved on generated answers
    fitted    a router that learned the makers' labels instead, without traces

    runs/NAME/routing/seed-N/   experts/ traces.npz ar0/ ar1/ cloning.json ar1-training/ ...

Every stage is a folder that is written whole, with a key of what it depends on; a second call, or
another process, finds it finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bem.config import RouterConfig, TrainingConfig
from bem.errors import ConfigError
from bem.experiments.adapted import put_on, routed_by
from bem.experiments.inputs import RunInputs, encoded_rows
from bem.experiments.measuring.answers import context_length, episode_scores
from bem.experiments.routing.labels import OF_THE_STACK, SHARED, fit_labels
from bem.experiments.routing.skills import routed, skills_of
from bem.experiments.tuning import Search, trial_facts
from bem.experts.expert import read_expert, write_lora
from bem.experts.stack import fixed_updates
from bem.files import locked, made_under, sha256_file, sha256_json, write_json, write_text
from bem.releases.named import router_of
from bem.routing.mount import blank_expert, mount
from bem.routing.mounted import Mounted, check_files
from bem.training.bc import clone
from bem.training.data import Encoded, Example, data_hash, encode
from bem.training.early_stopping import validation_loss
from bem.training.environment import Environment
from bem.training.fit import STATE, FitResult, fit
from bem.training.policy_gradient import Iteration, improve
from bem.training.traces import Traces, trace

Say = Callable[[str, int, int, str], None]
"""(stage, done, of, detail)"""


class RoutingArtifacts:
    """Experts, traces and routers of one seed, each made when first asked for."""

    def __init__(self, inputs: RunInputs, seed: int, say: Say):
        assert inputs.config.routing is not None
        self.inputs, self.seed, self.say = inputs, seed, say
        self.config, self.routing = inputs.config, inputs.config.routing
        self.folder = inputs.folder.routing(seed)
        self.skills = skills_of(self.routing, inputs.tasks)
        self._by_task = {task.name: task for task in inputs.tasks}
        self.shares = bool(self.routing.shared_rank)
        """One expert acts in every chunk, beside the chosen one."""
        saved = self.routing.checkpoint
        self.saved = None if saved is None else self._checked(router_of(saved))
        """Folder of a router that is taken as it is."""

    def _checked(self, folder: Path) -> Path:
        """The folder, if it holds the experts that the config names."""
        saved = [expert["name"] for expert in check_files(folder)["experts"]]
        self.shares = SHARED in saved  # no setting knows what was saved
        named = list(self._names())
        if saved != named:
            raise ConfigError(
                f"routing.checkpoint {self.routing.checkpoint} holds the experts {', '.join(saved)}; "
                f"routing.experts say {', '.join(named)}."
            )
        return folder

    @property
    def model(self) -> Any:
        """The bare base."""
        return self.inputs.model

    @property
    def held_out(self) -> list[Example]:
        """Held-out rows of all tasks, in order."""
        return [row for task in self.inputs.tasks for row in task.dev]

    # --- stages -----------------------------------------------------------------------------------

    def experts(self) -> Path:
        """Folder of the trained experts (with a router that is not trained yet, unless all were saved)."""
        if self.saved is not None:
            return self.saved
        return self._stage("experts", self._key("experts"), self._train_experts)

    def ar0(self) -> Path:
        """Folder of the cloned router."""
        return self._stage("ar0", self._key("ar0"), self._clone, self.experts)

    def ar1(self) -> Path:
        """Folder of the router after policy gradient; or of the one that was saved."""
        if self.saved is not None:
            return self.saved
        return self._stage("ar1", self._key("ar1"), self._improve, self.ar0)

    def fitted(self) -> Path:
        """Folder of the router that is fitted to the makers' labels."""
        return self._stage("fitted", self._key("fitted"), self._fit_labels, self.experts)

    def peers(self) -> Path:
        """Folder of the same experts as PEFT's methods take them: each with the shared one in it."""
        key = self._key("experts")
        return self._stage("peer-experts", key, self._fold_shared, self.experts)

    def _key(self, stage: str) -> str:
        """sha256 of everything that a stage depends on, its predecessors included."""
        routing, tuning = self.routing.model_dump(mode="json"), self.config.tuning
        parts: dict[str, Any] = {
            "base": self.inputs.base,
            "data": self.inputs.data["train"],
            "seed": self.seed,
            "training": self.config.expert_training.model_dump(mode="json"),
            **self._expert_facts(),
        }
        if "validation" in self.inputs.data:
            parts["validation"] = self.inputs.data["validation"]
        if self.saved is not None:
            parts["checkpoint"] = sha256_file(self.saved / "manifest.json")
        if tuning is not None:
            parts["tuning"] = tuning.model_dump(mode="json")
        if stage in ("ar0", "ar1"):
            parts["router"], parts["cloning"] = routing["router"], routing["cloning"]
        if stage == "fitted":
            parts["labelled_rows"] = self._labelled
        if stage == "ar1":
            parts["policy_gradient"] = routing["policy_gradient"]
        return sha256_json(parts)

    def _expert_facts(self) -> dict[str, Any]:
        """What the experts are, before they are trained."""
        routing = self.routing.model_dump(mode="json")
        return {
            "experts": [routing[key] for key in ("experts", "expert_rank", "shared_rank")],
            "stack": [routing["router"][key] for key in OF_THE_STACK],
        }

    def _stage(
        self,
        name: str,
        key: str,
        make: Callable[..., None],
        source: Callable[[], Path] | None = None,
    ) -> Path:
        """The folder of a stage; made, after its source, unless it is there with this key.

        Another process that needs the same stage waits for it.
        """
        folder, mark = self.folder / name, self.folder / f"{name}.json"
        if self._is_made(folder, mark, key):
            return folder
        made_from = [source()] if source else []
        waiting = lambda: self.say(f"waiting for another process: {name}", 0, 0, "")  # noqa: E731
        with locked(self.folder / ".lock", wait=waiting):
            if not self._is_made(folder, mark, key):
                shutil.rmtree(folder, ignore_errors=True)
                make(folder, *made_from)
                write_json(mark, {"key": key})
        return folder

    @staticmethod
    def _is_made(folder: Path, mark: Path, key: str) -> bool:
        return folder.is_dir() and made_under(mark, key)

    def _train_experts(self, folder: Path) -> None:
        work = self.folder / "experts-training"
        training = self._expert_training(work)
        with self._blank_experts(self.seed) as mounted:
            with mounted.training("experts"):
                result = self._fit_experts(mounted, self.seed, training, work)
            extra = {"learning_rate": training.learning_rate, "step": result.kept_step}
            mounted.save(folder, self.inputs.data["train"], extra)
        (work / STATE).unlink(missing_ok=True)

    @contextmanager
    def _blank_experts(self, seed: int) -> Iterator[Mounted]:
        """Experts that were not trained yet, on the base."""
        layer, config = self.routing.router.router_layer, self._router_config(seed)
        blanks = [
            blank_expert(self.model, name, self._rank(name), layer, about)
            for name, about in self._names().items()
        ]
        with put_on(self.model, lambda base: mount(base, blanks, config)) as mounted:
            yield mounted

    def _expert_training(self, work: Path) -> TrainingConfig:
        """How the experts are fitted: at the rate that the search on the first seed chose, if there is one."""
        config, training = self.config, self.config.expert_training
        if config.tuning is None:
            return training
        first = config.seeds[0]
        facts = trial_facts(self.inputs, first) | self._expert_facts()
        search = Search("experts", self.inputs.folder.tuning, config.tuning, training, facts)
        tuned = search.tuned(
            lambda *trial: self._trial(first, *trial),
            lambda what, trial, of: self.say("tuning experts", trial, of, what),
        )
        if self.seed == first:
            search.hand_over(tuned.learning_rate, work)
        return tuned

    def _trial(self, seed: int, training: TrainingConfig, folder: Path, until: int) -> float:
        """Train the beginning of all experts; their loss on the validation rows."""
        rows = encoded_rows(self.inputs, self._gold(self.inputs.validation))
        with self._blank_experts(seed) as mounted, mounted.training("experts"):
            self._fit_experts(mounted, seed, training, folder, until)
            return validation_loss(mounted, self.inputs.tokenizer, rows)

    def _fit_experts(
        self,
        mounted: Mounted,
        seed: int,
        training: TrainingConfig,
        work: Path,
        until: int | None = None,
    ) -> FitResult:
        steps = until or training.steps
        return fit(
            mounted,
            self.inputs.tokenizer,
            self._gold(self.inputs.examples),
            training,
            work,
            seed,
            lambda step: self.say("training experts", step.step, steps, f"loss {step.loss:.3f}"),
            f"experts seed {seed}",
            validation=self._gold(self.inputs.validation),
            until=until,
        )

    def _gold(self, rows: Sequence[Example]) -> list[Example]:
        """Rows with each turn under the expert of its skill."""
        return routed(rows, [self.skills.route(row) for row in rows])

    def _names(self) -> dict[str, str]:
        """Every expert, and what it is for; the shared one last."""
        owners = self.skills.owner.items()
        about = {
            name: ", ".join(skill for skill, owner in owners if owner == option)
            for option, name in enumerate(self.skills.experts, 1)
        }
        return about | ({SHARED: "acts in every chunk"} if self.shares else {})

    def _rank(self, name: str) -> int:
        return self.routing.shared_rank if name == SHARED else self.routing.expert_rank

    def _router_config(self, seed: int | None = None) -> RouterConfig:
        seed = self.seed if seed is None else seed
        changes: dict[str, Any] = {"seed": self.routing.router.seed + seed}
        if self.shares:
            changes["shared"] = SHARED
        return self.routing.router.model_copy(update=changes)

    def _fold_shared(self, folder: Path, experts: Path) -> None:
        with self.mounted(experts) as mounted:
            n = len(self.skills.experts)
            for e, name in enumerate(self.skills.experts):
                gates = torch.zeros(len(mounted.experts))
                gates[e], gates[n:] = 1.0, 1.0  # the shared one, if there is one, stands last
                write_lora(fixed_updates(mounted.stacks, gates), folder / name)

    @contextmanager
    def with_new_router(self, experts: Path) -> Iterator[Mounted]:
        """The trained experts under a router that is not trained yet."""
        read = [
            replace(read_expert(experts / "experts" / name, self.model, name), about=about)
            for name, about in self._names().items()
        ]
        with put_on(self.model, lambda base: mount(base, read, self._router_config())) as mounted:
            yield mounted

    def _fit_labels(self, folder: Path, experts: Path) -> None:
        rows = self.labelled_rows()
        fit_labels(
            self.model, self.inputs.tokenizer, experts,
            [self.skills.labelled(row) for row in rows], self.seed, self._room(0), folder,
            lambda stage, done, of: self.say(stage, done, of, f"{len(rows)} conversations"),
        )  # fmt: skip

    def _clone(self, folder: Path, experts: Path) -> None:
        with self.with_new_router(experts) as mounted:
            rows = self.traced_rows()
            encoded = [self.encoded(row) for row in rows]
            traces = self.trace(mounted, encoded, self.folder / "traces.npz")
            result = clone(
                mounted,
                encoded,
                traces,
                self.inputs.pad_id,
                self.routing.cloning,
                self.seed,
                self.config.eval_batch_size,
                lambda text: self.say(text, 0, 0, ""),
            )
            mounted.save(folder, data_hash(rows))
        write_json(self.folder / "cloning.json", asdict(result))

    def _improve(self, folder: Path, source: Path) -> None:
        settings, examples = self.routing.policy_gradient, self.inputs.examples
        work = self._own_work(self.folder / "ar1-training", self._key("ar1"))
        with self.mounted(source) as mounted:
            environment = Environment(
                mounted,
                self.inputs.tokenizer,
                self.score,
                settings.reward,
                settings.max_new_tokens,
                settings.batch_size,
            )
            room = self._room(settings.max_new_tokens)
            prompts = [
                encode(row, self.inputs.tokenizer, room, with_answer=False) for row in examples
            ]
            improve(environment, examples, prompts, settings, work, self.seed, self._tell_step)
            mounted.save(folder, self.inputs.data["train"])

    @staticmethod
    def _own_work(work: Path, key: str) -> Path:
        """A folder to work in; what other experts or settings left there is deleted."""
        mark = work / "key"
        if mark.is_file() and mark.read_text(encoding="utf-8") != key:
            shutil.rmtree(work)
        write_text(mark, key)
        return work

    def _tell_step(self, step: Iteration) -> None:
        refused = "" if step.accepted else " (step refused)"
        detail = f"reward {step.reward:.3f}, KL {step.kl:.4f}, entropy {step.entropy:.2f}{refused}"
        alarm = f" ALARM: {step.alarm}" if step.alarm else ""
        iterations = self.routing.policy_gradient.iterations
        self.say("policy gradient", step.iteration, iterations, detail + alarm)

    # --- what stages and arms share ---------------------------------------------------------------

    def mounted(self, folder: Path) -> AbstractContextManager[Mounted]:
        """A saved router on the base, inside a `with`."""
        return routed_by(self.model, folder)

    def traced_rows(self) -> list[Example]:
        """The training conversations that are traced: a seeded choice."""
        return self._some_rows(self.routing.cloning.rows)

    def labelled_rows(self) -> list[Example]:
        """Those whose labels are learned from."""
        return self._some_rows(self._labelled)

    @property
    def _labelled(self) -> int:
        return self.routing.labelled_rows or self.routing.cloning.rows

    def _some_rows(self, most: int) -> list[Example]:
        examples = self.inputs.examples
        count = min(most, len(examples))
        rng = np.random.default_rng([self.seed, 3])
        chosen = sorted(rng.choice(len(examples), count, replace=False).tolist())
        return [examples[i] for i in chosen]

    def encoded(self, row: Example) -> Encoded:
        """A whole conversation, answer included, as long as it may be."""
        return encode(row, self.inputs.tokenizer, self._room(0))

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
            self.inputs.pad_id,
            self.routing.cloning,
            self.config.eval_batch_size,
            cache,
            lambda done, of: self.say("tracing", done, of, f"{len(rows)} conversations"),
            experts_alone,
        )

    def score(self, row: Example, answer: str) -> dict[str, float]:
        """What an episode's answer is worth; see `episode_scores`."""
        return episode_scores(self._by_task[row.task], row, answer)

    def _room(self, new_tokens: int) -> int:
        """Longest conversation in tokens that leaves room for an answer."""
        return min(self.config.training.max_length, context_length(self.model) - new_tokens)
