"""BEM as a PEFT method.

    import bem
    model = peft.get_peft_model(model, bem.BemConfig(variant="v1", rank=8))

Then Trainer, TRL, `save_pretrained`, `PeftModel.from_pretrained`, `disable_adapter` and the hub work
as for any method. PEFT has no API to register a method, so we add entries to its three tables.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import mapping as peft_mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from bem.adapters.build import Parts, size_of
from bem.adapters.hooks import Runtime
from bem.adapters.learning import teach, unteach
from bem.adapters.names import clean_name
from bem.adapters.peft_config import BEM, BemConfig
from bem.adapters.quantised import refuse_untrainable
from bem.adapters.queries import find_queries
from bem.adapters.rollback import rolled_back
from bem.adapters.sites import ATTN_OUT, Sites
from bem.adapters.unfit import refuse_uncontrolled, refuse_unfit
from bem.control.controller import ChunkReader
from bem.control.generation import ADAPTER_NAMES, MarkedGenerate
from bem.control.wiring import Wiring
from bem.errors import AttachError
from bem.variants.digest import weights_digest
from bem.variants.watch import Watch


class BemSite(nn.Module, BaseTunerLayer):
    """A frozen linear layer and, per adapter name, what is attached to it."""

    adapter_layer_names = ("bem_update", "bem_film", "bem_controller", "bem_shaping")
    live: tuple[Any, int | None] | None  # the active update, and the index of its control

    def __init__(self, base_layer: nn.Module, runtime: Runtime):
        super().__init__()
        self.base_layer = base_layer
        self.bem_update, self.bem_film = nn.ModuleDict(), nn.ModuleDict()
        self.bem_controller, self.bem_shaping = nn.ModuleDict(), nn.ModuleDict()
        self._disable_adapters, self.merged_adapters, self._active_adapter = False, [], []
        self.runtime = runtime
        self.indices: dict[
            str, int | None
        ] = {}  # adapter name -> place of its control; None: static
        self._refresh()

    def add(self, name: str, parts: Parts) -> None:
        """Attach one adapter's modules."""
        for home, module in (
            (self.bem_update, parts.update),
            (self.bem_film, parts.film),
            (self.bem_controller, parts.controller),
            (self.bem_shaping, parts.shaping),
        ):
            if module is not None:
                home[name] = module
        self.train(self.base_layer.training)  # what is new follows the mode of the model
        self._move_adapter_to_device_of_base_layer(name)
        self._refresh()

    def parts(self, name: str) -> Parts:
        """One adapter's modules here."""

        def of(home: nn.ModuleDict) -> Any:
            return home[name] if name in home else None  # noqa: SIM401 - ModuleDict has no get

        return Parts(
            of(self.bem_update), of(self.bem_film), of(self.bem_controller), of(self.bem_shaping)
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        live = self.live
        if live is None:
            return y
        update, index = live
        if index is None:
            return update.update(y, x, None, None)
        # once per site and token: attributes instead of calls wherever nothing is wrong
        context = self.runtime.ambient.context or self.runtime.ambient.current()
        control = (context.tables or context.decided())[index]
        update = context.updates[index] if context.updates else None
        update = update or context.acting.members[index].update
        return update(y, x, control, context.slot)

    def _refresh(self) -> None:
        """Look up the active update once, not in every forward pass."""
        name = next(iter(self.active_adapters), "")
        self.live = None
        if not self.disable_adapters and name in self.bem_update:
            self.live = (self.bem_update[name], self.indices.get(name))

    def set_adapter(self, adapter_names: Any, inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise AttachError(
                f"one BEM adapter is active at a time, not {len(names)}: {', '.join(names)}."
            )
        super().set_adapter(names, inference_mode=inference_mode)
        self._refresh()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.indices.pop(adapter_name, None)
        self._refresh()

    def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
        raise NotImplementedError(
            "a controlled update changes from chunk to chunk and cannot be merged into one weight; "
            "s0 can be exported as PEFT LoRA (Attached.save_lora) and merged there."
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class BemModel(BaseTuner):
    """Injects BEM into a model; PEFT calls it."""

    prefix = "bem_"
    tuner_layer_cls = BemSite
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        refuse_unfit(self.model)
        self._plan = peft_config.plan(self.model)
        refuse_untrainable(self.model, self._plan.sites.blocks)
        if any(parts.controller is not None for parts in self._plan.parts.values()):
            refuse_uncontrolled(self.model)
        peft_config.site_sizes = self._plan.sizes
        peft_config.target_modules = set(self._plan.parts)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        site = target
        if not isinstance(target, BemSite):
            site = BemSite(target, runtime_of(self.model))
            self._replace_module(parent, target_name, site, target)
        assert isinstance(site, BemSite)
        site.add(adapter_name, self._plan.parts[clean_name(current_key)])
        inference = bool(getattr(peft_config, "inference_mode", False))
        if adapter_name in self.active_adapters:
            site.set_adapter(adapter_name, inference_mode=inference)
        else:
            site.set_requires_grad(adapter_name, False)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        # not by target_modules: PEFT shortens a long list to suffixes
        return clean_name(key) in peft_config.site_sizes and not key.endswith(".base_layer")

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        with rolled_back(model):
            with warnings.catch_warnings():
                # the plan has excluded them: PEFT finds nothing left to exclude
                warnings.filterwarnings("ignore", message="You have passed exclude_modules")
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            runtime_of(model).plans[adapter_name] = self._plan
            rewire(model)
            teach(model, active_modules)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT asks here before a call, and takes `adapter_names` out of it."""
        names = kwargs.get("adapter_names")
        if names is not None and set(names) != set(self.active_adapters):
            raise AttachError(ADAPTER_NAMES)
        yield

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        rewire(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        rewire(self.model)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        rewire(self.model)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        config.about_to_be_saved()
        config.site_sizes = {s: size_of(p) for s, p in adapters_of(model, adapter_name)}
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Checkpoint keys name no adapter: PEFT's own rule only looks at a key's last two parts."""
        return re.sub(rf"(\.bem_[a-z]+)\.{re.escape(adapter_name)}\.", r"\1.", key)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        runtime_of(self.model).remove()
        unteach(self.model)
        for name in ("generate", "bem_runtime"):
            self.model.__dict__.pop(name, None)
        return model


def runtime_of(model: nn.Module) -> Runtime:
    """The model's runtime; made, and `generate` taught to mark the prompt's end, on first use."""
    if "bem_runtime" not in model.__dict__:
        model.__dict__["bem_runtime"] = Runtime()
        if hasattr(model, "generate"):
            model.__dict__["generate"] = MarkedGenerate(
                model, model.__dict__["bem_runtime"].ambient
            )
    return model.__dict__["bem_runtime"]


def rewire(model: nn.Module) -> None:
    """After anything was attached, removed, switched on or off: renew hooks and the order of controls."""
    runtime = runtime_of(model)
    sites = {clean_name(n): m for n, m in model.named_modules() if isinstance(m, BemSite)}
    present = {name for site in sites.values() for name in site._get_available_adapters()}
    plans = {name: plan for name, plan in runtime.plans.items() if name in present}
    wirings = {
        name: w
        for name, plan in plans.items()
        if (w := _wire(name, plan.sites, plan.layer, sites, model))
    }
    first = next(iter(sites.values()), None)
    active = next(iter(first.active_adapters), "") if first and not first.disable_adapters else ""
    runtime.plans, runtime.wiring = plans, wirings.get(active)
    runtime.remove()
    if plans:
        sites_of = next(iter(plans.values())).sites
        modules = {clean_name(n): m for n, m in model.named_modules()}
        attn_out = {s.layer: modules[s.name] for s in sites_of.found if s.role == ATTN_OUT}
        runtime.install(model, list(wirings.values()), sites_of.blocks, attn_out)
    for site in sites.values():
        site._refresh()


def _wire(
    name: str, plan: Sites, layer: int, sites: dict[str, BemSite], model: nn.Module
) -> Wiring | None:
    """The wiring of one adapter; None if it is static."""
    controller: ChunkReader | None = None
    controlled: list[Any] = []
    films: dict[int, int] = {}
    shapings: dict[int, int] = {}
    for place in plan.above(layer):
        if place.name not in sites:
            continue
        site = sites[place.name]
        parts = site.parts(name)
        controller = controller or parts.controller
        site.indices[name] = None
        if parts.update is not None and parts.update.control_width:
            site.indices[name] = len(controlled)
            controlled.append(parts.update)
        if parts.film is not None:
            films[place.layer] = len(controlled)
            controlled.append(parts.film)
        if parts.shaping is not None:
            shapings[place.layer] = len(controlled)
            controlled.append(parts.shaping)
    if controller is None:
        return None
    queries = find_queries(model, plan, list(shapings)) if shapings else {}
    owner = _Owner([*controlled, controller])
    return Wiring(
        name, layer, len(plan.blocks), controller, controlled, films, shapings, queries, owner
    )


class _Owner:
    """Digest of an adapter's weights, made anew when one of them changed."""

    def __init__(self, modules: list[nn.Module]):
        tensors = {n: t for i, m in enumerate(modules) for n, t in _named(m, f"{i}.").items()}
        self._names, self._tensors = list(tensors), list(tensors.values())
        self._watch, self._digest = Watch(), ""

    def __call__(self) -> str:
        if self._watch.changed(*self._tensors) or not self._digest:
            self._digest = weights_digest(dict(zip(self._names, self._tensors, strict=True)))
        return self._digest


def _named(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + n: t for n, t in module.state_dict(keep_vars=True).items()}


def adapters_of(model: nn.Module, name: str) -> list[tuple[str, Parts]]:
    """(site name, its modules) of one adapter, bottom to top."""
    return [
        (clean_name(n).removeprefix("base_model.model."), m.parts(name))
        for n, m in model.named_modules()
        if isinstance(m, BemSite) and name in m._get_available_adapters()
    ]


def modules_of(parts: Parts) -> list[nn.Module]:
    """What there is of an update, a modulation, a temperature and a controller."""
    each = (parts.update, parts.film, parts.shaping, parts.controller)
    return [m for m in each if m is not None]


def active_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of the adapter that acts; none while adapters are switched off."""
    sites = [m for m in model.modules() if isinstance(m, BemSite) and not m.disable_adapters]
    return [m for s in sites for name in s.active_adapters for m in modules_of(s.parts(name))]


def register() -> None:
    """Enter BEM into PEFT's tables, unless PEFT ships a method of that name one day."""
    if BEM in peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[BEM] = BemConfig  # type: ignore[index]
    peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING[BEM] = BemModel  # type: ignore[index]
    peft_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[BEM] = BemModel.prefix  # type: ignore[index]


register()
