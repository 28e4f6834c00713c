"""A lent parameter shares its storage with a slab until the first write; the slab never changes."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from bem.experts.lent import LentParameter, lend


def lent():
    """A parameter over a part of a slab, as a stack makes them: transposed."""
    slab = torch.arange(12.0).reshape(3, 4)
    parameter = nn.Parameter(torch.empty(4, 2), requires_grad=False)
    lend(parameter, slab[:2].t())
    return parameter, slab


WRITES = {
    "in place": lambda p: p.mul_(2),
    "with an operator": lambda p: p.__iadd__(1),
    "power": lambda p: p.__ipow__(2),
    "to a part": lambda p: p.__setitem__(0, 7.0),
    "as a result": lambda p: torch.add(torch.ones(4, 2), 1, out=p),
    "of many": lambda p: torch._foreach_add_([torch.ones(2), p], 1.0),
    "copied": lambda p: p.copy_(torch.ones(4, 2)),
    "an initialiser": lambda p: nn.init.ones_(p),
    "another storage": lambda p: setattr(p, "data", torch.ones(4, 2)),
}


@pytest.mark.parametrize("how", WRITES)
@torch.no_grad()
def test_a_write_gives_it_storage_of_its_own_and_leaves_the_slab(how):
    parameter, slab = lent()
    before, plain = slab.clone(), nn.Parameter(parameter.detach().clone(), requires_grad=False)
    assert parameter.untyped_storage().data_ptr() == slab.untyped_storage().data_ptr()
    WRITES[how](parameter)
    WRITES[how](plain)
    assert torch.equal(slab, before) and torch.equal(parameter, plain)
    assert not torch.equal(parameter, slab[:2].t())
    assert type(parameter) is nn.Parameter and parameter.is_contiguous()


@pytest.mark.parametrize("how", ["an attribute", "a method"])
def test_it_takes_storage_of_its_own_before_it_trains(how):
    parameter, slab = lent()
    before = slab.clone()
    if how == "an attribute":
        parameter.requires_grad = True
    else:
        parameter.requires_grad_()
    assert type(parameter) is nn.Parameter and parameter.requires_grad
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.square().sum().backward()
    optimizer.step()
    assert torch.equal(slab, before) and not torch.equal(parameter, slab[:2].t())


def test_reading_and_freezing_leave_it_as_it_is():
    parameter, slab = lent()
    parameter.requires_grad = False
    parameter.requires_grad_(False)
    assert torch.equal(parameter + 1, slab[:2].t() + 1) and type(parameter + 1) is torch.Tensor
    assert isinstance(parameter, nn.Parameter) and parameter.sum() == 28
    assert torch.equal(torch.nn.functional.linear(torch.eye(2), parameter), slab[:2])
    assert np.array_equal(parameter.numpy(), slab[:2].t().numpy())
    assert type(parameter) is LentParameter


@torch.no_grad()
def test_an_argument_that_is_only_read_stays_lent_beside_one_that_is_written():
    (read, _), (written, slab) = lent(), lent()
    written.zero_()
    written.copy_(read)
    torch.add(read, 1, out=written)
    assert type(read) is LentParameter and torch.equal(written, slab[:2].t() + 1)


def test_its_writes_are_counted():
    parameter, _ = lent()
    version = parameter._version
    parameter.mul_(2)
    assert parameter._version > version


def test_a_copy_and_a_pickle_share_nothing():
    parameter, slab = lent()
    file = io.BytesIO()
    torch.save(parameter, file)
    file.seek(0)
    for other in (copy.deepcopy(parameter), torch.load(file, weights_only=False)):
        assert isinstance(other, nn.Parameter) and torch.equal(other, parameter)
        with torch.no_grad():
            other.zero_()
        assert slab.sum() == 66


def test_a_write_in_inference_mode_makes_no_inference_tensor_of_it():
    parameter, slab = lent()
    with torch.inference_mode():
        parameter.mul_(2)
    parameter.mul_(2)
    assert slab.sum() == 66 and parameter.sum() == 4 * 28 and not parameter.is_inference()
