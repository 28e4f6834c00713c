"""Models that a controller cannot follow: said when it is attached, not in the first forward pass."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn
from transformers.cache_utils import Cache

from bem.errors import AttachError

OWN_STATES = ("state", "mems", "past_buckets_states")
"""Arguments by which a decoder hands on what it has read in another form than a `Cache`."""
SEVERAL = {
    "altup_num_inputs": "carries several residual streams",
    "hc_mult": "carries several residual streams",
    "H_cycles": "runs its blocks several times in one pass",
}
"""Settings of a model that are above 1, and what that means."""


def refuse_unroutable(model: nn.Module, arguments: Sequence[str]) -> None:
    """Control is decided once a pass, from the one stream of hidden states, and travels with the `Cache`.

    Args:
        arguments: names of those of the decoder's forward pass.
    Raises:
        AttachError: this model does otherwise.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    why = next((w for name, w in SEVERAL.items() if (getattr(config, name, 1) or 1) > 1), None)
    if own := next((name for name in OWN_STATES if name in arguments), None):
        why = f"hands its state on as {own!r}, which no control can travel with"
    if cache := _own_cache(type(model)):
        why = f"keeps part of its state beside the layers of its {cache}"
    if why is not None:
        raise AttachError(
            f"{type(model).__name__} {why}: control that changes from chunk to chunk is not possible here. Use a "
            "static variant, s0 or v3."
        )


def _own_cache(model: type) -> str | None:
    """The cache class that a model brings along, if it counts more than its layers."""
    module = model.__module__
    classes = (c for c in vars(sys.modules[module]).values() if isinstance(c, type))
    own = (c for c in classes if issubclass(c, Cache) and c.__module__ == module)
    return next((c.__name__ for c in own if c.__len__ is not Cache.__len__), None)
