"""A frozen model with experts and a router on it, and the folder that it is saved in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from bem import files
from bem.adapters.attach import NAME, Attached, attach_parts
from bem.adapters.build import Parts
from bem.adapters.copies import without_adapter
from bem.adapters.lora import CONFIG
from bem.adapters.lora import WEIGHTS as EXPERT
from bem.adapters.names import name_of_base
from bem.adapters.peft_method import BemSite
from bem.adapters.version import base_identity
from bem.config import AdapterConfig, RouterConfig
from bem.errors import AttachError, CheckpointError
from bem.experts.expert import Expert, Update, check_name, from_updates, write_lora
from bem.experts.slab import PACKING
from bem.experts.stack import ExpertStack
from bem.routing.pack import Pack
from bem.routing.router import AgenticRouter

MANIFEST = "manifest.json"
WEIGHTS = "router.safetensors"
FIT = "fit.json"
"""How a fitted router was fitted, for people; nothing reads it."""
FORMAT = 2
KIND = "router"


class Mounted(Attached):
    """A frozen model with experts side by side and a router. `model` is a `peft.PeftModel`.

    What decides and acts is `pack`, one pointer: `unload`, `adopt` and training move it, and a sequence
    goes on under the pack with which it began. What `parameters()` names, and so what trains, is the
    router's policy or the experts' weights: see `training`. To train while the model answers
    unchanged, train a `shadow` and `adopt` it.
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
        wiring = self.base.bem_runtime.wiring
        sites = {id(m): n for n, m in self.base.named_modules() if isinstance(m, ExpertStack)}
        self.stacks: dict[str, ExpertStack] = {
            sites[id(stack)].partition(".bem_update.")[0]: stack for stack in wiring.members
        }
        """The experts at each site, in the order of their controls."""
        self._pack: Pack | None = None
        self._origin = object()
        self._point_at(wiring.controller)

    def __repr__(self) -> str:
        gone = [
            n
            for n, there in zip(self._options, self.router.available[1:], strict=True)
            if not there
        ]
        parts = [f"{len(self.experts)} experts ({', '.join(e.name for e in self.experts)})"]
        parts += [f"{', '.join(gone)} unloaded"] if gone else []
        if not self.router.trained:
            parts.append("the router is not trained: the bare base answers where no route is given")
        return f"Mounted({'; '.join(parts)})"

    @property
    def _options(self) -> tuple[str, ...]:
        return self.router.space.experts

    @classmethod
    def inject(
        cls, model: Any, parts: dict[str, Parts], config: RouterConfig, experts: Sequence[Expert]
    ) -> Mounted:
        """Put finished modules on a model that carries nothing; see `bem.mount`."""
        trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        adapter = AdapterConfig(
            variant="routed", router_layer=config.router_layer, chunk_size=config.chunk_size
        )
        assert config.router_layer is not None, "bem.mount has resolved it"
        peft_model = attach_parts(model, parts, config.router_layer)
        mounted = cls(peft_model, adapter, trainable, config, experts)
        _ = mounted.pack  # made now: from here on the experts' weights are held once
        return mounted

    # --- what acts --------------------------------------------------------------------------------

    @property
    def router(self) -> AgenticRouter:
        """The router itself."""
        return self._router

    @property
    def _home(self) -> nn.ModuleDict:
        """Where PEFT keeps the router."""
        homes = (m.bem_controller for m in self.base.modules() if isinstance(m, BemSite))
        return next(home for home in homes if NAME in home)

    @property
    def pack(self) -> Pack:
        """What decides and acts for every sequence that begins now; the same until something changes."""
        return self._current(self.base.dtype)

    def _current(self, dtype: torch.dtype) -> Pack:
        with PACKING:
            members = tuple(stack.at(dtype) for stack in self.stacks.values())
            pack, router = self._pack, self._router
            if (
                pack is not None
                and pack.controller is router
                and all(a is b for a, b in zip(pack.members, members, strict=True))
            ):
                return pack
            made = Pack(router, members, self._origin, tuple(self.stacks))
            self._pack = made
            return made

    def _acting(self) -> Pack | None:
        """For forward passes; None while experts train: then their parameters act as they are."""
        return None if self.trains == "experts" else self.pack

    def _point_at(self, router: AgenticRouter) -> None:
        router.source, router.origin = self._acting, self._origin
        self._router = router
        self._home[NAME] = router

    def acting(self, applied: Float[Tensor, " width"]) -> str:
        """Digest of the experts that act under an applied control, for `chunk_keys`; of a cache that
        began under another pack ask that one."""
        return self.pack.acting(applied)

    def unload(self, name: str) -> None:
        """Take one expert away: no sequence that begins now meets it. One that runs goes on as if nothing
        had happened.

        Raises:
            ValueError: no expert of that name can be chosen.
        """
        option = self.router.space.option(name)
        with PACKING:
            for stack in self.stacks.values():
                stack.clear(option - 1)
            router = self.router.twin(self.router.policy)
            router.available[option] = False
            self._point_at(router)

    def shadow(self) -> Mounted:
        """A second one on the same base tensors, with experts, router and hooks of its own: train it while
        this one answers unchanged, then `adopt` it. It draws no random numbers."""
        plain = without_adapter(self)
        sites = list(self.stacks)
        parts = {site: Parts(stack.twin()) for site, stack in self.stacks.items()}
        home = next(n for n, m in self.base.named_modules() if m is self._home)
        at = home.rpartition(".")[0]
        parts[at] = Parts(parts[at].update, controller=self.router.twin())
        assert list(parts) == sites
        config, experts = self.router_config.model_copy(), list(self.experts)
        return Mounted.inject(plain, parts, config, experts)

    def adopt(self, shadow: Mounted) -> None:
        """Take over what acts in a shadow, by moving one pointer; the shadow stays what it is.

        Raises:
            AttachError: it does not stand on the same base tensors, or other experts, sites, ranks or
                options make it another model; or its weights are not finite.
        """
        self._check_shadow(shadow)
        shadow.pack.check_finite()
        router = shadow.router.twin()
        with PACKING:
            for site, stack in self.stacks.items():
                stack.take(shadow.stacks[site])
            self.experts, self.router_config = list(shadow.experts), shadow.router_config
            self._point_at(router)

    def pack_of(self, shadow: Mounted) -> Pack:
        """What would act here if a shadow were adopted; it is not, and may be trained on.

        Raises:
            AttachError: as `adopt`.
        """
        self._check_shadow(shadow)
        pack, router = shadow.pack, shadow.router.twin()
        pack.check_finite()
        router.source, router.origin = self._acting, self._origin
        return Pack(router, pack.members, self._origin, tuple(self.stacks))

    def _check_shadow(self, shadow: Mounted) -> None:
        ours, theirs = (
            {n: p for n, p in m.base.named_parameters() if ".bem_" not in n} for m in (self, shadow)
        )
        if ours.keys() != theirs.keys() or any(p is not theirs[n] for n, p in ours.items()):
            raise AttachError(
                "only a shadow of this model can be adopted: it shares the base's tensors."
            )
        shapes = [
            ({n: s.ranks for n, s in m.stacks.items()}, m.router.space, m.router.observed)
            for m in (self, shadow)
        ]
        if shapes[0] != shapes[1]:
            raise AttachError(
                "other experts, sites, ranks or options: mount it as a model of its own."
            )

    # --- what it is -------------------------------------------------------------------------------

    def acting_config(self) -> dict[str, Any]:
        """The settings on which outputs depend once the weights are given."""
        router = self.router_config.model_dump(mode="json", exclude={"seed", "orthogonal"})
        if router["vision"] is None:  # versions from before it could be said keep their names
            del router["vision"]
        names = [e.name for e in self.experts]
        state = {"trained": self.router.trained, "available": self.router.available.tolist()}
        return {"variant": "routed", "experts": names, "router": router, **state}

    def weight_groups(self) -> dict[str, dict[str, Tensor]]:
        """Each expert, and the router's policy, with their tensors."""
        groups: dict[str, dict[str, Tensor]] = {}
        for expert in self.experts:
            number, named = len(groups), {}
            for site, stack in self.stacks.items():
                if stack.ranks[number]:
                    u, v = stack.factors(number)
                    named |= {f"{site}.u": u.detach(), f"{site}.v": v.detach()}
            groups[f"expert {expert.name}"] = named
        return groups | {"router": dict(self.router.policy.state_dict())}

    # --- training ---------------------------------------------------------------------------------

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of what trains; of everything while nothing does."""
        everything = super().named_parameters()
        if self.trains == "nothing":
            return everything
        return [(n, p) for n, p in everything if p.requires_grad]

    @contextmanager
    def training(self, what: Literal["router", "experts"]) -> Iterator[None]:
        """Only these parameters train inside; experts are brought into their canonical form after."""
        modules = [self.router.policy] if what == "router" else list(self.stacks.values())
        parameters = [p for module in modules for p in module.parameters()]
        before = self.router.trained
        self.trains, self.router.trained = what, before or what == "router"
        for parameter in parameters:
            parameter.requires_grad = True
        try:
            yield
        except BaseException:
            self.router.trained = before
            raise
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
        self.name_what_acts()

    def name_what_acts(self) -> None:
        """Renew `experts` from the weights as they are: digests are of what acts."""
        self.experts = [
            from_updates(e.name, self.updates_of(e.name), e.source, e.about) for e in self.experts
        ]

    def updates_of(self, name: str) -> dict[str, Update]:
        """One expert's updates as they are now."""
        number = [e.name for e in self.experts].index(name)
        updates = {site: stack.update_of(number) for site, stack in self.stacks.items()}
        return {site: update for site, update in updates.items() if update.v.shape[0]}

    # --- the folder -------------------------------------------------------------------------------

    def save(  # type: ignore[override]
        self, folder: str | Path, data_hash: str = "", extra: dict[str, Any] | None = None
    ) -> Path:
        """Write router and experts, whole or not at all; every expert is a plain PEFT LoRA.

        Args:
            data_hash: sha256 of the training data.
            extra: anything JSON that belongs to the record.
        Raises:
            CheckpointError: the disk is full or not writable, or the folder holds what this library
                did not write.
        """
        folder = Path(folder)
        base = name_of_base(self.base)
        with files.whole_folder(folder, written_here, CheckpointError) as work:
            for expert in self.experts:
                check_name(expert.name)
                write_lora(self.updates_of(expert.name), work / "experts" / expert.name, base)
            policy = {k: v.detach().cpu() for k, v in self.router.policy.state_dict().items()}
            save_file(policy, work / WEIGHTS)
            files.write_json(work / MANIFEST, self._manifest(work, data_hash, extra))
        return folder

    def _manifest(self, work: Path, data_hash: str, extra: dict[str, Any] | None) -> dict[str, Any]:
        written = sorted(f for f in work.rglob("*") if f.is_file())
        return {
            "format": FORMAT,
            "kind": KIND,
            "router": self.router_config.model_dump(mode="json"),
            "trained": self.router.trained,
            "available": self.router.available.tolist(),
            "experts": [{"name": e.name, "about": e.about} for e in self.experts],
            "base": asdict(base_identity(self.base)),
            "version": self.own_version.to_dict(),
            "data": data_hash,
            "extra": extra or {},
            "files": {f.relative_to(work).as_posix(): files.sha256_file(f) for f in written},
        }


def is_router(folder: str | Path) -> bool:
    """Does the folder hold what `Mounted.save` wrote? Its manifest says so."""
    manifest = Path(folder) / MANIFEST
    return manifest.is_file() and _read(manifest).get("kind") == KIND


def written_here(folder: Path) -> list[str]:
    """Files of a folder that `Mounted.save` wrote."""
    if not is_router(folder):
        return []
    written = (WEIGHTS, MANIFEST, FIT, f"experts/*/{CONFIG}", f"experts/*/{EXPERT}")
    return [p.relative_to(folder).as_posix() for name in written for p in folder.glob(name)]


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
    manifest = _read(path)
    if manifest.get("kind") != KIND:
        raise CheckpointError(f"{folder} holds a single adapter: load it with bem.load.")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}: train the router again."
        )
    files.check_listed(folder, manifest.get("files"), CheckpointError)
    return manifest


def _read(path: Path) -> dict[str, Any]:
    manifest = files.read_json(path, CheckpointError)
    return manifest if isinstance(manifest, dict) else {}
