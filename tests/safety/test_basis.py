"""A basis on disk is the basis; what lies above a block is what it must leave alone."""

import json

import pytest
import torch

from bem.errors import CheckpointError
from bem.safety.basis import CARD, TENSORS, read_basis
from tests.conftest import make_llama
from tests.safety.guarded import make_basis


def test_it_comes_back_as_it_was(tmp_path):
    basis = make_basis(make_llama())
    basis.write(tmp_path / "basis")
    again = read_basis(tmp_path / "basis")
    assert again.digest == basis.digest and again.base == basis.base
    for one, other in zip(again.layers, basis.layers, strict=True):
        assert one.block == other.block and torch.equal(one.directions, other.directions)
        assert torch.equal(one.low, other.low) and torch.equal(one.high, other.high)


def test_a_writer_leaves_alone_what_is_protected_behind_it_and_above():
    basis = make_basis(make_llama(), blocks=(1, 2), s=3)
    assert basis.forbidden(0).basis.shape == basis.forbidden(1).basis.shape == (32, 6)
    assert basis.forbidden(2).basis.shape == (32, 3)
    assert basis.forbidden(3) is None
    for layer in basis.layers:  # spanned by what is forbidden at the bottom
        p = basis.forbidden(0).basis
        u = layer.directions.double()
        assert torch.allclose(p @ (p.T @ u), u, atol=1e-6)


def test_equal_directions_in_two_blocks_count_once():
    basis = make_basis(make_llama(), blocks=(1,))
    layer = basis.layers[0]
    twice = type(basis)(
        basis.base, (layer, type(layer)(2, layer.directions, layer.low, layer.high)), {}
    )
    assert twice.forbidden(0).basis.shape == (32, 3)


@pytest.mark.parametrize("damage", ["tensors", "card", "missing", "number"])
def test_damaged_files_are_refused(tmp_path, damage):
    folder = make_basis(make_llama()).write(tmp_path / "basis")
    card = json.loads((folder / CARD).read_text())
    if damage == "tensors":
        raw = bytearray((folder / TENSORS).read_bytes())
        raw[-1] ^= 1
        (folder / TENSORS).write_bytes(bytes(raw))
    elif damage == "card":
        (folder / CARD).write_text(json.dumps(card | {"base": "0" * 64}))
    elif damage == "missing":
        (folder / TENSORS).unlink()
    else:
        (folder / CARD).write_text(json.dumps(card | {"blocks": [7]}))
    with pytest.raises(CheckpointError):
        read_basis(folder)
