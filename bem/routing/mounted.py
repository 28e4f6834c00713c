"""A frozen model with experts and a router on it, and the folder that it is saved in."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from bem.adapters.attach import NAME, Attached
from bem.adapters.checkpoint import file_hash
from bem.adapters.lora import readable
from bem.adapters.sites import base_hash
from bem.config import AdapterConfig, RouterConfig
from bem.errors import CheckpointError
from bem.experts.expert import Expert, Update, from_updates, write_lora
from bem.experts.stack import ExpertStack
from bem.routing.router import AgenticRouter

MANIFEST = "manifest.json"
WEIGHTS = "router.safetensors"
FORMAT = 1


class Mounted(Attached):
    """A frozen model with experts side by side and a router. `model` is a `peft.PeftModel`.

    What `parameters()` names, and so what trains, is the router's policy or the experts' weights:
    see `training`.
    """

    def __init__(
        self,
        peft_model: Any,
        config: AdapterConfig,
        trainable_before: dict[str, bool],
        router_config: RouterConfig,
        experts: Sequence[Expert],
    ):
        super().__init__(peft_model, config, trainable_before)
        self.router_config = router_config
        self.experts = list(experts)
        self.trains: Literal["router", "experts", "nothing"] = "nothing"
        for parameter in super().parameters():
            parameter.requires_grad = False
        peft_model.eval()

    @property
    def router(self) -> AgenticRouter:
        """The router itself."""
        return next(m for m in self.modules() if isinstance(m, AgenticRouter))

    @property
    def stacks(self) -> dict[str, ExpertStack]:
        """The experts at each site."""
        from bem.adapters.peft_method import adapters_of

        parts = {site: p.update for site, p in adapters_of(self.base, NAME)}
        return {site: u for site, u in parts.items() if isinstance(u, ExpertStack)}

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of what trains; of everything while nothing does."""
        everything = super().named_parameters()
        if self.trains == "nothing":
            return everything
        return [(n, p) for n, p in everything if p.requires_grad]

    @contextmanager
    def training(self, what: Literal["router", "experts"]) -> Iterator[None]:
        """Only these parameters train inside; experts are brought into their canonical form after."""
        self.trains = what
        chosen = [self.router.policy] if what == "router" else list(self.stacks.values())
        parameters = [p for module in chosen for p in module.parameters()]
        for parameter in parameters:
            parameter.requires_grad = True
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad, parameter.grad = False, None
            self.trains = "nothing"
            self.model.eval()
            if what == "experts":
                self._canonicalise()

    def _canonicalise(self) -> None:
        for stack in self.stacks.values():
            stack.canonicalise()
        names = [e.name for e in self.experts]
        self.experts = [
            from_updates(n, self.updates_of(n), e.source, e.about)
            for n, e in zip(names, self.experts, strict=True)
        ]

    def updates_of(self, name: str) -> dict[str, Update]:
        """One expert's updates as they are now."""
        at = [e.name for e in self.experts].index(name)
        found = {site: stack.update_of(at) for site, stack in self.stacks.items()}
        return {site: update for site, update in found.items() if update.v.shape[0]}

    def unload(self, name: str) -> None:
        """Take one expert away. Sequences that follow it choose anew at their next chunk; the rest of
        their running chunk gets the bare base."""
        at = self.router.space.option(name)
        self.router.available[at] = False
        for stack in self.stacks.values():
            stack.clear(at - 1)

    def acting(self, applied: Tensor) -> str:
        """Digest of the experts that act under an applied control (width,), for `chunk_keys`."""
        used: set[int] = set()
        for member in self.base.bem_runtime.wiring.members:
            c, applied = applied[: member.control_width], applied[member.control_width :]
            used |= set(member.owner[c.to(member.owner.device) != 0].tolist())
        digests = [self.experts[e].digest for e in sorted(used)]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def save(  # type: ignore[override]
        self, folder: str | Path, data_hash: str = "", extra: dict[str, Any] | None = None
    ) -> Path:
        """Write router and experts, whole or not at all; every expert is a plain PEFT LoRA.

        Args:
            data_hash: sha256 of the training data.
            extra: anything JSON that belongs to the record.
        Raises:
            CheckpointError: the disk is full or not writable.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for expert in self.experts:
                write_lora(self.updates_of(expert.name), work / "experts" / expert.name)
            policy = {k: v.detach().cpu() for k, v in self.router.policy.state_dict().items()}
            save_file(policy, work / WEIGHTS)
            (work / MANIFEST).write_text(
                json.dumps(self._manifest(work, data_hash, extra), indent=2)
            )
            readable(work)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(work, folder)
        except OSError as error:
            raise CheckpointError(
                f"could not write the router {folder}: {error}. Nothing was left behind."
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return folder

    def _manifest(self, work: Path, data_hash: str, extra: dict[str, Any] | None) -> dict[str, Any]:
        files = sorted(f for f in work.rglob("*") if f.is_file())
        return {
            "format": FORMAT,
            "kind": "router",
            "router": self.router_config.model_dump(mode="json"),
            "experts": [{"name": e.name, "about": e.about} for e in self.experts],
            "base": base_hash(self.base),
            "data": data_hash,
            "extra": extra or {},
            "files": {f.relative_to(work).as_posix(): file_hash(f) for f in files},
        }


def is_router(folder: str | Path) -> bool:
    """Does the folder hold what `Mounted.save` wrote?"""
    manifest = Path(folder) / MANIFEST
    return manifest.is_file() and '"kind": "router"' in manifest.read_text(encoding="utf-8")


def check_files(folder: Path) -> dict[str, Any]:
    """The manifest of a saved router, after every file's hash was compared.

    Raises:
        CheckpointError: no router, a missing file or a changed one.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: not a router that `Mounted.save` wrote."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if manifest.get("kind") != "router":
        raise CheckpointError(f"{folder} holds a single adapter: load it with bem.load.")
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing.")
        if file_hash(folder / name) != digest:
            raise CheckpointError(f"{folder}: {name} was changed after saving.")
    return manifest
