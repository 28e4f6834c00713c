"""While tokens are decoded, inside a chunk and across its end, nothing is read back to the host."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bem
from tests.conftest import make_llama
from tests.routing.mounted import mounted

BEM = str(Path(bem.__file__).parent)
IDS = torch.randint(3, 300, (2, 60), generator=torch.Generator().manual_seed(1))
READS = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__len__",
)
# operators whose result or shape the host must wait for
WAITING = (
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "repeat_interleave",
)  # fmt: skip


def caller():
    """The innermost frame outside of torch and of this file."""
    frame = sys._getframe(1)
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""


class Readbacks(TorchDispatchMode):
    """Notes every place in bem that waits for a number on the device."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.places = []
        for name in READS[:-1]:
            monkeypatch.setattr(torch.Tensor, name, self._noting(name, getattr(torch.Tensor, name)))

    def _noting(self, name, real):
        def noting(tensor, *args, **kwargs):
            self._note(name)
            return real(tensor, *args, **kwargs)

        return noting

    def _note(self, what):
        place = caller()
        if place.startswith(BEM):
            self.places.append(f"{what} at {place}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = name == "index" and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if name in WAITING or masks:
            self._note(name)
        return func(*args, **(kwargs or {}))


def test_what_waits_is_noticed(monkeypatch):
    watch, where = Readbacks(monkeypatch), torch.arange(3)
    monkeypatch.setattr(sys.modules[__name__], "BEM", "/")  # everybody
    with watch:
        if where.sum() > 2 and where[where > 1].tolist():
            where.nonzero()
    noted = {place.split(" at ")[0] for place in watch.places}
    assert {"__bool__", "index", "tolist", "nonzero"} <= noted


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"confidence": 0.9, "fallback": "c", "trust_radius": 0.1, "trust_norm": "spectral"},
        {"shared": "c", "trust_radius": 0.1, "trust_relative": True},
    ],
)
@pytest.mark.parametrize("remembered", [True, False])
@torch.no_grad()
def test_decoding_with_a_router_reads_nothing_back(monkeypatch, settings, remembered):
    if not remembered:  # as for a router of too many actions, and for stacks that are gathered
        monkeypatch.setattr("bem.routing.composer.SMALL", 0)
        monkeypatch.setattr("bem.experts.slab.GATHER_ABOVE", 0)
        monkeypatch.setattr("bem.routing.composer.Rules.tabled", lambda *_: False)
    model = mounted(make_llama(), **settings)
    cache = model.model(input_ids=IDS[:, :10], use_cache=True).past_key_values
    for at in range(
        10, 20
    ):  # the first token of a prompt may count, the first chunk may be composed
        model.model(input_ids=IDS[:, at : at + 1], past_key_values=cache, use_cache=True)
    watch, before = Readbacks(monkeypatch), cache.layers[-1].state.running.number.clone()
    with watch:
        for at in range(20, 45):
            model.model(input_ids=IDS[:, at : at + 1], past_key_values=cache, use_cache=True)
    assert (cache.layers[-1].state.running.number - before).min() >= 3  # chunks ended
    assert not watch.places, "\n".join(sorted(set(watch.places)))
