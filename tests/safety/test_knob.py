"""Kappa: the operator moves it, slowly downwards; a request may only raise it; everything is noted."""

import threading

import pytest
import torch

from bem.errors import SafetyError
from bem.safety.knob import Knob


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_it_rises_at_once_and_falls_slowly():
    clock = Clock()
    knob = Knob(level=0.5, slew=0.01, clock=clock)
    assert knob.move(0.9, "ada", "incident") == 0.9
    clock.now = 10.0
    assert knob.move(0.2, "ada", "over") == pytest.approx(0.8)  # 10 s at 0.01
    clock.now = 110.0
    assert knob.move(0.2, "ada", "over") == 0.2
    assert [(m.who, m.asked) for m in knob.audit] == [("ada", 0.9), ("ada", 0.2), ("ada", 0.2)]


def test_nobody_gets_below_the_floor():
    knob = Knob(level=0.4, floor=0.3)
    with pytest.raises(SafetyError, match=r"\[0.3, 1\]"):
        knob.move(0.2, "eve", "please")
    with knob.raised(0.0):
        assert knob.now() == 0.4


def test_a_request_only_raises_and_only_for_itself():
    knob, seen = Knob(level=0.3), []
    with knob.raised(0.7), knob.raised(0.5):
        assert knob.now() == 0.7
        thread = threading.Thread(target=lambda: seen.append(knob.now()))
        thread.start()
        thread.join()
    assert knob.now() == 0.3 and seen == [0.3]
    with pytest.raises(ZeroDivisionError), knob.raised(1.0):
        1 / 0  # noqa: B018
    assert knob.now() == 0.3


def test_rows_may_differ():
    knob = Knob(level=0.3)
    with knob.raised(torch.tensor([0.0, 0.8])):
        assert torch.equal(knob.now(), torch.tensor([0.3, 0.8]))
        with knob.raised(0.5):
            assert torch.equal(knob.now(), torch.tensor([0.5, 0.8]))


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_what_is_no_kappa_is_refused(bad):
    with pytest.raises(SafetyError):
        Knob(level=bad)
    with pytest.raises(SafetyError):
        Knob().move(bad, "eve", "")
    with pytest.raises(SafetyError), Knob().raised(bad):
        pass
