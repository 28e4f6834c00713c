"""What is taken over is what would be computed; what differs in anything that counts is computed."""

import numpy as np
import pytest
import torch

from bem.errors import MeasurementError
from bem.experiments.measuring import answers
from bem.experiments.measuring.answers import measure
from bem.experiments.measuring.kept import KeptAnswers
from bem.experiments.routing.skills import routed
from bem.routing.mount import blank_expert, mount
from bem.tasks.load import Task
from tests.experiments.measuring.test_answers import rows


@pytest.fixture
def experts(micro_llama):
    """Two experts that answer differently."""
    mounted = mount(micro_llama, [blank_expert(micro_llama, name, 2) for name in ("a", "b")])
    torch.manual_seed(3)
    with torch.no_grad(), mounted.training("experts"):
        for parameter in mounted.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return mounted


@pytest.fixture
def asked(monkeypatch):
    """Rows of each batch that a model was really asked for."""
    seen = []
    give = answers.give
    monkeypatch.setattr(
        answers, "give", lambda a, t, b, *r: seen.append(len(b)) or give(a, t, b, *r)
    )
    return seen


def task(options, **changes):
    values = dict(train=[], metrics=("em", "chrf", "loss"), primary="chrf", max_new_tokens=5)
    dev = routed(rows(len(options), history=True), options)
    return Task(**{"name": "t", **values, "dev": dev, **changes})


def store(folder, mounted):
    return KeptAnswers(folder, mounted.version.digest, mounted.base)


OPTIONS = [[1, 1], [1, 2], [2, 1], [2, 2], [1, 0]]


def same(one, other):
    assert one.metrics.keys() == other.metrics.keys()
    for name, scores in one.metrics.items():
        np.testing.assert_allclose(scores, other.metrics[name], atol=1e-5)
    for name in ("kv_hits", "kv_held", "kv_needed"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


def test_an_arm_measured_with_kept_answers_equals_one_measured_without(
    experts, tokenizer, tmp_path, asked
):
    cold = measure(experts, tokenizer, task(OPTIONS), batch_size=2)
    first = measure(experts, tokenizer, task(OPTIONS), batch_size=2, kept=store(tmp_path, experts))
    assert asked == [2, 2, 1] * 2 and first.meta["taken_over"] == 0
    warm = measure(
        experts,
        tokenizer,
        task(OPTIONS),
        batch_size=2,
        kept=store(tmp_path, experts),
        predictions=tmp_path / "p.jsonl",
    )
    assert asked == [2, 2, 1] * 2 and warm.meta["taken_over"] == 5
    same(cold, first)
    same(first, warm)
    assert np.array_equal(first.metrics["loss"], warm.metrics["loss"])
    assert "taken_over" not in cold.meta


def test_a_row_with_another_route_at_any_turn_is_computed(experts, tokenizer, tmp_path, asked):
    measure(experts, tokenizer, task(OPTIONS), kept=store(tmp_path, experts))
    others = [[1, 1], [1, 1], [2, 1], [1, 2], [1, 0]]
    told = []
    warm = measure(
        experts,
        tokenizer,
        task(others),
        kept=store(tmp_path, experts),
        on_progress=lambda *at: told.append(at),
    )
    assert asked == [5, 2] and warm.meta["taken_over"] == 3 and told == [(3, 5), (5, 5)]
    same(warm, measure(experts, tokenizer, task(others)))


def test_other_weights_and_longer_answers_take_nothing_over(experts, tokenizer, tmp_path, asked):
    kept = store(tmp_path, experts)
    measure(experts, tokenizer, task(OPTIONS), kept=kept)
    measure(experts, tokenizer, task(OPTIONS, max_new_tokens=6), kept=kept)
    with torch.no_grad(), experts.training("experts"):
        experts.parameters()[0].add_(1.0)
    measure(experts, tokenizer, task(OPTIONS), kept=store(tmp_path, experts))
    assert asked == [5, 5, 5]


def test_what_a_killed_process_had_written_is_not_asked_again(
    experts, tokenizer, tmp_path, asked, monkeypatch
):
    give = answers.give

    def killed(*given):
        if len(asked) == 2:
            raise KeyboardInterrupt
        return give(*given)

    monkeypatch.setattr(answers, "give", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(experts, tokenizer, task(OPTIONS), batch_size=2, kept=store(tmp_path, experts))
    monkeypatch.setattr(answers, "give", give)
    after = measure(experts, tokenizer, task(OPTIONS), batch_size=2, kept=store(tmp_path, experts))
    assert asked == [2, 2, 1] and after.meta["taken_over"] == 4


def test_two_stores_on_one_folder_see_what_the_other_keeps(experts, tokenizer, tmp_path, asked):
    one, other = store(tmp_path, experts), store(tmp_path, experts)
    measure(experts, tokenizer, task(OPTIONS[:3]), kept=one)
    assert measure(experts, tokenizer, task(OPTIONS), kept=other).meta["taken_over"] == 3
    assert measure(experts, tokenizer, task(OPTIONS), kept=one).meta["taken_over"] == 5
    assert asked == [3, 2]


def test_a_file_that_is_none_of_ours_is_named(experts, tokenizer, tmp_path):
    measure(experts, tokenizer, task(OPTIONS), kept=store(tmp_path, experts))
    (file,) = tmp_path.rglob("*.json")
    file.write_text('{"key": {"ids": []}}')
    with pytest.raises(MeasurementError, match=r"json holds no kept answers .* Delete it"):
        store(tmp_path, experts).refresh()
