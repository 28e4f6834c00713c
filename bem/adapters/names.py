"""Names: of modules, as they were before anything was attached; of experts, which become folders."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from bem.errors import AttachError

# What PEFT and torch put between a module's name and the module.
WRAPPERS = frozenset(
    {
        "base_layer",
        "original_module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    }
)
NAME = re.compile(r"\w[\w .+@-]{0,126}\w|\w")


def clean_name(name: str) -> str:
    """A module's name as it was before anything was attached to it or wrapped around it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        else:
            return model


def innermost(model: Any) -> Any:
    """The base model inside torch.compile, DistributedDataParallel and PEFT."""
    model = unwrapped(model)
    return innermost(model.get_base_model()) if hasattr(model, "get_base_model") else model


def name_of_base(model: Any) -> str | None:
    """What AutoPeft and a model card call the base: its hub id or folder; None if it has neither."""
    return getattr(innermost(model), "name_or_path", None) or None


def check_name(name: str, what: str = "expert") -> str:
    """The name itself, if it can be a folder inside the folder that an adapter is saved in.

    Raises:
        AttachError: it holds a path separator or anything but letters, digits, spaces and `_ . + @ -`
            between two letters or digits, or is longer than 128 characters.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise AttachError(
            f"{what} name {name!r:.80} cannot be used: it becomes the name of a folder. Use letters, digits, "
            "spaces and _ . + @ - with a letter or digit at both ends, at most 128 characters."
        )
    return name
