"""Small experts that really differ, for tests of routing."""

import torch

import bem
from bem.experts.expert import Expert, Update, from_updates
from bem.routing.mount import blank_expert


def expert(model, name: str, rank: int, seed: int, layer: int | None = None) -> Expert:
    """A random expert on all sites from `layer` on."""
    generator = torch.Generator().manual_seed(seed)
    born = blank_expert(model, name, rank, layer)
    updates = {
        site: Update(
            0.05 * torch.randn(update.u.shape, generator=generator, device="cpu").to(update.u),
            update.v,
        )
        for site, update in born.updates.items()
    }
    return from_updates(name, updates, "test")


FREE = {
    "chunk_size": 8,
    "switch_cost": 0.0,
    "hysteresis": 0.0,
    "spans": (1, 2),
    "ranks": (1, 2, 4),
    "strengths": (0.5, 1.0, 1.5),
}


def mounted(model, trained=True, **overrides):
    """Three experts of ranks 4, 4 and 2, chunks of 8 tokens, few rules in the way; the router's random
    weights count as trained ones."""
    names = (("a", 4, 0), ("b", 4, 1), ("c", 2, 2))
    made = bem.mount(model, [expert(model, *each) for each in names], **{**FREE, **overrides})
    made.router.trained = trained
    return made
