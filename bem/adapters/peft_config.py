"""The config by which PEFT knows BEM."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from bem.adapters.build import VARIANTS
from bem.adapters.card import say_how_to_load
from bem.adapters.plan import Plan, Selection, plan_of
from bem.adapters.version import SiteSize
from bem.config import AdapterConfig, parse_adapter
from bem.errors import AttachError, CheckpointError


class Method(enum.StrEnum):
    """The name of our method, in the form of PEFT's own."""

    BEM = "BEM"


BEM = Method.BEM
OF_PEFT = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping")
SELECTING = ("target_modules", "exclude_modules", "layers_to_transform")


class BemConfig(PeftConfig):
    """PEFT config of BEM: a variant, its knobs (see `bem.config.adapters`), and PEFT's own fields.

    What is saved also holds the rank and scale of every adapted site: exactly these are made when it
    is loaded.
    """

    def __init__(
        self,
        variant: str = "s0",
        *,
        target_modules: str | Iterable[str] | None = None,
        exclude_modules: str | Iterable[str] | None = None,
        layers_to_transform: int | Iterable[int] | None = None,
        modules_to_save: Iterable[str] | None = None,
        site_sizes: Mapping[str, Any] | None = None,
        **values: Any,
    ):
        """
        Args:
            target_modules, exclude_modules, layers_to_transform: choose among the sites that BEM finds, by
                PEFT's rules. Whatever selects no site is an error.
            modules_to_save: must be empty: the base stays as it is.
            site_sizes: site name -> {"rank", "scale"}; written when saved.
            **values: knobs of the variant, and PEFT's fields such as task_type.
        Raises:
            ConfigError: an unknown knob, or one of another variant.
            AttachError: something that cannot be honoured.
        """
        values.pop("peft_type", None)
        peft_version = values.pop("peft_version", None)
        super().__init__(
            peft_type=BEM,  # type: ignore[arg-type]
            peft_version=peft_version,
            **{k: values.pop(k) for k in OF_PEFT if k in values},
        )
        if modules_to_save:
            raise AttachError(
                f"modules_to_save={list(modules_to_save)}: BEM trains adapters alone, the base stays as it is, so "
                "that one checkpoint fits every copy of it. Train these modules first, then attach."
            )
        self.variant, self.modules_to_save = variant, None
        self.target_modules = _collection(target_modules)
        self.exclude_modules = _collection(exclude_modules)
        self.layers_to_transform = _collection(layers_to_transform)
        self.selection = Selection(
            self.target_modules, self.exclude_modules, self.layers_to_transform
        )
        self.site_sizes = {s: _size(z) for s, z in site_sizes.items()} if site_sizes else None
        self._base_name: str | None = None
        self.made: Plan | None = None
        """Modules that were made already, for the next model."""
        for knob, value in self._parsed(values).model_dump().items():
            setattr(self, knob, value)
        self._knobs = tuple(VARIANTS[variant].config.model_fields)

    def adapter_config(self) -> AdapterConfig:
        """The adapter's own settings, validated."""
        return self._parsed({knob: getattr(self, knob) for knob in self._knobs})

    def plan(self, model: nn.Module) -> Plan:
        """What goes where on a model."""
        made, self.made = self.made, None
        return made or plan_of(model, self.adapter_config(), self.selection, self.site_sizes)

    def about_to_be_saved(self) -> None:
        """Hide the base's name until the config is written: PEFT would ask the hub for its vocabulary,
        and add the base's embeddings to the adapter if they were resized."""
        self._base_name = self.base_model_name_or_path or self._base_name
        self.base_model_name_or_path = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON."""
        sizes = self.site_sizes
        return {
            **super().to_dict(),
            "base_model_name_or_path": self._base_name or self.base_model_name_or_path,
            "peft_type": BEM.value,
            **self.adapter_config().model_dump(mode="json"),
            **{name: _plain(getattr(self, name)) for name in SELECTING},
            "site_sizes": sizes
            and {s: {"rank": z.rank, "scale": z.scale} for s, z in sizes.items()},
        }

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and how to load it into the model card beside it."""
        self.base_model_name_or_path = self._base_name or self.base_model_name_or_path
        self._base_name = None
        super().save_pretrained(save_directory, **kwargs)
        say_how_to_load(Path(save_directory))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BemConfig) and other.to_dict() == self.to_dict()

    def __repr__(self) -> str:
        return f"BemConfig({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"

    def _parsed(self, values: dict[str, Any]) -> AdapterConfig:
        kinds = {kind: each.config for kind, each in VARIANTS.items()}
        return parse_adapter({**values, "variant": self.variant}, "BemConfig", kinds)


class ReadyConfig(PeftConfig):
    """For modules that were made elsewhere, such as mounted experts. PEFT cannot save it."""

    def __init__(self, plan: Plan, **values: Any):
        super().__init__(peft_type=BEM, **values)  # type: ignore[arg-type]
        self._plan = plan
        self.target_modules: Any = None
        self.site_sizes: dict[str, SiteSize] | None = None

    def plan(self, model: nn.Module) -> Plan:
        """The plan that was given."""
        return self._plan

    def about_to_be_saved(self) -> None:
        """Refused: the config alone does not make these modules."""
        raise CheckpointError(
            "experts with a router are saved with Mounted.save and loaded with bem.load_router, not by PEFT."
        )


def _collection(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int) else set(value)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _size(value: Any) -> SiteSize:
    return value if isinstance(value, SiteSize) else SiteSize(value["rank"], value["scale"])
