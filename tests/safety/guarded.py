"""A random basis for a micro base, and adapters whose every weight is random."""

import torch

import bem
from bem.adapters.version import base_digest
from bem.safety.basis import ProtectedLayer, SafetyBasis
from tests.conftest import make_llama

VARIANTS = ("s0", "pt1", "v1", "v2", "v3", "v4")


def make_basis(model, blocks=(1, 2), s=3, d=32, high=2.0) -> SafetyBasis:
    generator = torch.Generator().manual_seed(5)
    layers = []
    for block in blocks:
        drawn = torch.randn(d, s, generator=generator)
        layers.append(
            ProtectedLayer(block, torch.linalg.qr(drawn).Q, torch.zeros(s), torch.full((s,), high))
        )
    return SafetyBasis(base_digest(model), tuple(layers), {"tried": []})


def random_adapter(variant: str, seed: int = 0, **knobs):
    """Attached to a fresh micro Llama, from block 0 on, every parameter drawn anew."""
    attached = bem.attach(make_llama(), variant, router_layer=0, chunk_size=8, **knobs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return attached
