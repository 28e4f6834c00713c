"""What is measured is what the model says: batches, padding and order change nothing."""

import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import bem
from bem.errors import MeasurementError
from bem.experiments.measuring.answers import context_length, measure, quality
from bem.files import json_lines
from bem.tasks.load import Task
from bem.training import row_losses as losses
from bem.training.data import Example, encode

WORDS = ["name", "the", "function", "that", "this", "docstring", "describes", "return", "value"]


def rows(n, history=False):
    rng = np.random.default_rng(0)
    past = (("say the name", "value"),) if history else ()
    return [
        Example(
            f"r{i}",
            " ".join(rng.choice(WORDS, 3 + 7 * (i % 4))),
            (" ".join(rng.choice(WORDS, 1 + i % 3)),),
            group=f"g{i // 2}",
            history=past,
            meta={"ask": "odd" if i % 2 else "even"},
        )
        for i in range(n)
    ]


def task(n=7, name="t", **changes):
    values = dict(train=[], metrics=("em", "chrf", "loss"), primary="em", max_new_tokens=6)
    values |= {"dev": rows(n), **changes}
    return Task(name=name, **values)


@pytest.fixture(params=["s0", "v1"])
def attached(request, micro_llama):
    head = torch.randn(320, 32)  # untied and confident: answers differ and near-ties are rare
    micro_llama.lm_head.weight = torch.nn.Parameter(head)
    adapter = bem.attach(micro_llama, request.param, rank=4, chunk_size=8)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return adapter


def by_hand(attached, tokenizer, example, new_tokens):
    """Greedy tokens by full forwards without a cache, and the mean loss of the answer."""
    model, end = attached.model, tokenizer.eos_token_id
    prompt = encode(example, tokenizer, 512, with_answer=False).input_ids
    turns = encode(example, tokenizer, 512).turn_starts
    ids: list[int] = []
    for _ in range(new_tokens):
        whole = [*prompt, *ids]
        starts = torch.zeros(1, len(whole), dtype=torch.bool)
        starts[0, : len(prompt)] = torch.tensor(turns[: len(prompt)])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole]), turn_starts=starts).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == end:
            ids.pop()
            break
    full = encode(example, tokenizer, 512)
    with torch.no_grad():
        log_p = model(
            input_ids=torch.tensor([full.input_ids]), turn_starts=torch.tensor([full.turn_starts])
        ).logits[0].log_softmax(-1)  # fmt: skip
    answer = range(full.prompt_length, len(full))
    loss = -sum(float(log_p[t - 1, full.input_ids[t]]) for t in answer) / len(answer)
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), loss


@pytest.mark.parametrize("history", [False, True])
def test_answers_and_losses_equal_those_of_one_row_at_a_time(
    attached, tokenizer, tmp_path, history
):
    t = task(dev=rows(7, history))
    path = tmp_path / "predictions.jsonl"
    m = measure(attached, tokenizer, t, batch_size=3, predictions=path)
    written = [row for _, row in json_lines(path)]
    assert [row["id"] for row in written] == [f"t/r{i}" for i in range(7)] == list(m.example_ids)
    for i, example in enumerate(t.dev):
        prediction, loss = by_hand(attached, tokenizer, example, 6)
        assert written[i]["prediction"] == prediction
        assert m.metrics["loss"][0, i] == pytest.approx(loss, abs=1e-4)
        assert written[i]["references"] == list(example.references)
    if not history:  # rows with a history have so much in common that they get one answer
        assert len({row["prediction"] for row in written}) > 1


def test_the_batch_size_changes_nothing(attached, tokenizer):
    one, four = (measure(attached, tokenizer, task(), batch_size=b) for b in (1, 4))
    assert one.example_ids == four.example_ids
    assert np.array_equal(one.metrics["em"], four.metrics["em"])
    assert np.array_equal(one.metrics["chrf"], four.metrics["chrf"])
    np.testing.assert_allclose(one.metrics["loss"], four.metrics["loss"], atol=1e-4)
    assert np.array_equal(one.kv_needed, four.kv_needed)


def test_a_model_that_says_the_reference_is_right(attached, tokenizer):
    found = measure(attached, tokenizer, task(3), predictions=None)
    assert found.metrics["em"].mean() == 0.0
    said = [by_hand(attached, tokenizer, row, 6)[0] for row in rows(3)]
    right = [
        Example(row.id, row.input, (f"no {answer}", answer), meta={"form": "code"})
        for row, answer in zip(rows(3), said, strict=True)
    ]
    m = measure(attached, tokenizer, task(dev=right))
    assert (m.metrics["em"] == 1.0).all() and (m.metrics["chrf"] > 99).all()
    assert (m.metrics["quality"] == 1.0).all()


def test_clusters_slices_price_and_meta_are_handed_on(attached, tokenizer):
    first, second = task(4, "a", slice_by=("ask",)), task(2, "b", metrics=("validity",))
    m = measure(attached, tokenizer, [first, second], name="arm")
    assert m.name == "arm" and m.clusters == ("a/g0", "a/g0", "a/g1", "a/g1", "b/g0", "b/g0")
    assert {name: mask.tolist() for name, mask in m.slices.items()} == {
        "a": [1, 1, 1, 1, 0, 0],
        "b": [0, 0, 0, 0, 1, 1],
        "a/even": [1, 0, 1, 0, 0, 0],
        "a/odd": [0, 1, 0, 1, 0, 0],
    }
    assert list(m.metrics) == ["quality", "em", "validity", "chrf", "loss"]
    price = attached.price()
    assert (m.adapter_parameters, m.adapter_flops_per_token) == (
        price.parameters,
        price.flops_per_token,
    )
    assert m.meta["tasks"]["a"] == {"rows": 4, "primary": "em", "metrics": ["em", "chrf", "loss"]}
    assert measure(attached, tokenizer, task(2)).slices == {}


def test_quality_is_the_rows_own_primary_metric_between_0_and_1():
    scores = {"em": 1.0, "chrf": 40.0, "loss": 0.5}
    assert quality("em", scores) == 1.0
    assert quality("chrf", scores) == 0.4
    assert quality("loss", scores) == pytest.approx(math.exp(-0.5))


def test_every_variant_reuses_the_whole_cache(attached, tokenizer):
    m = measure(attached, tokenizer, task())
    assert m.kv_needed.min() > 0 and np.array_equal(m.kv_hits, m.kv_needed)


def test_without_a_cache_nothing_is_reused(attached, tokenizer, monkeypatch):
    generate = attached.base.generate
    monkeypatch.setattr(
        attached.base,
        "generate",
        lambda *a, generation_config, **k: generate(
            *a, generation_config=generation_config, use_cache=False, **k
        ),
    )
    m = measure(attached, tokenizer, task(3))
    assert m.kv_hits.sum() == 0 < m.kv_needed.sum()


def test_progress_counts_all_tasks_and_the_mode_is_given_back(attached, tokenizer):
    seen = []
    modes = [module.training for module in attached.model.modules()]
    assert len(set(modes)) == 2  # PEFT's wrapper trains, the base inside does not
    tasks = [task(5, "a"), task(2, "b")]
    measure(attached, tokenizer, tasks, batch_size=2, on_progress=lambda *at: seen.append(at))
    assert seen == [(2, 7), (4, 7), (5, 7), (7, 7)]
    assert [module.training for module in attached.model.modules()] == modes


def test_what_cannot_be_measured_is_refused(attached, tokenizer, tmp_path):
    with pytest.raises(MeasurementError, match="No held-out rows in t"):
        measure(attached, tokenizer, task(0))
    with pytest.raises(MeasurementError, match="Task names must differ, got t, t"):
        measure(attached, tokenizer, [task(), task()])
    with pytest.raises(MeasurementError, match="answers of 510 tokens leave 2 of the model's 512"):
        measure(attached, tokenizer, task(max_new_tokens=510))
    (tmp_path / "file").touch()
    with pytest.raises(MeasurementError, match=r"p\.jsonl could not be written: "):
        measure(attached, tokenizer, task(1), predictions=tmp_path / "file" / "p.jsonl")
    assert context_length(attached.model) == 512


def test_every_step_with_an_empty_cache_counts_as_no_hit(attached, tokenizer):
    # one token is handed in at each step, as with a cache, but nothing is there
    attached.base.register_forward_pre_hook(_emptied, with_kwargs=True, prepend=True)
    m = measure(attached, tokenizer, task(3))
    assert m.kv_hits.sum() == 0 < m.kv_needed.sum()


def _emptied(module, args, kwargs):
    kwargs["past_key_values"] = DynamicCache()
    return args, kwargs


class Saying:
    """A tokenizer that reads every answer as the same text."""

    def __init__(self, tokenizer, text):
        self._tokenizer, self._text = tokenizer, text

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **options):
        return self._tokenizer(*args, **options)

    def decode(self, ids, **options):
        return self._text


@pytest.mark.parametrize("odd", ["a\u2028b", "\x00\x85", "half \ud83d", "x" * 50_000])
def test_any_answer_is_written_and_read_back_as_it_was(micro_llama, tokenizer, tmp_path, odd):
    path = tmp_path / "predictions.jsonl"
    attached = bem.attach(micro_llama, "s0", rank=2)
    measure(attached, Saying(tokenizer, f"<{odd}>"), task(2), predictions=path)
    assert [row["prediction"] for _, row in json_lines(path)] == [f"<{odd}>"] * 2


def test_losses_in_small_portions_are_the_same(attached, tokenizer, monkeypatch):
    whole = measure(attached, tokenizer, task()).metrics["loss"]
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 320 * 100)
    np.testing.assert_allclose(
        measure(attached, tokenizer, task()).metrics["loss"], whole, atol=1e-5
    )
