"""A run is a function of (seed, data, config): killed and resumed, it gives the same bits."""

import errno
import json
import math
import os

import numpy as np
import pytest
import torch

import bem
from bem.adapters.copies import with_shared_weights
from bem.config import TrainingConfig
from bem.errors import DataError, Diverged, TrainingError
from bem.training.data import Example, collate, encode
from bem.training.fit import example_order, fit
from bem.training.losses import answer_columns, answer_nll, answer_targets, labelled_tokens

WORDS = ["name", "the", "function", "that", "this", "docstring", "describes", "return", "value"]


@pytest.fixture
def examples():
    """Twenty rows whose lengths and answer lengths differ."""
    rng = np.random.default_rng(0)
    return [
        Example(str(i), " ".join(rng.choice(WORDS, 2 + i % 5)), (" ".join(WORDS[: 1 + i % 4]),))
        for i in range(20)
    ]


def config(**changes):
    return TrainingConfig(
        **{"steps": 6, "batch_size": 4, "learning_rate": 0.01, "checkpoint_every": 2, **changes}
    )


def weights(attached):
    return {k: v.clone() for k, v in attached.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def killed_after(step, error=KeyboardInterrupt):
    def on_progress(metrics):
        if metrics.step == step:
            raise error

    return on_progress


# ------------------------------------------------------------ what is learnt


def test_the_answers_become_likely_and_the_base_stays(attach_lora, tokenizer, examples, tmp_path):
    attached = attach_lora()
    base = {n: p.clone() for n, p in attached.model.named_parameters() if not p.requires_grad}
    result = fit(attached, tokenizer, examples[:4], config(steps=40), tmp_path / "a", seed=0)
    assert result.final_loss < 0.6 * result.losses[0]
    assert result.final_loss == pytest.approx(np.mean(result.losses[-4:]))
    assert all(torch.equal(p, base[n]) for n, p in attached.model.named_parameters() if n in base)
    assert attached.steps == result.steps == 40
    assert not attached.model.training


def test_the_loss_is_the_mean_over_answer_tokens_of_the_step(
    attach_lora, tokenizer, examples, tmp_path
):
    attached = attach_lora(penalty=0.5)
    batch = example_order(20, 1, 8, seed=3)[0]
    encoded = [encode(examples[i], tokenizer, 512) for i in batch]
    total = count = 0.0
    for row in encoded:  # one by one, by hand
        with torch.no_grad():
            logits = attached.model(input_ids=torch.tensor([row.input_ids])).logits[0]
        log_p = logits.log_softmax(-1)
        for t in range(row.prompt_length, len(row)):
            total -= float(log_p[t - 1, row.input_ids[t]])
            count += 1
    result = fit(attached, tokenizer, examples, config(steps=1, batch_size=8), tmp_path, seed=3)
    assert result.losses[0] == pytest.approx(total / count, abs=1e-5)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["penalty"] > 0 and row["tokens"] == result.tokens == sum(map(len, encoded))


def test_accumulation_equals_one_big_batch(attach_lora, tokenizer, examples, tmp_path):
    runs = []
    for parts in (1, 2, 3, 8):
        attached = attach_lora(penalty=0.1)
        settings = config(steps=3, batch_size=8, accumulation=parts)
        result = fit(attached, tokenizer, examples, settings, tmp_path / str(parts), seed=0)
        runs.append((result.losses, weights(attached)))
    for losses, after in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        for key, value in after.items():
            torch.testing.assert_close(value, runs[0][1][key], rtol=1e-3, atol=2e-5)


def test_row_losses_agree_with_the_models_own_mean(micro_llama, tokenizer, examples):
    batch = collate([encode(e, tokenizer, 512) for e in examples[:5]], 0, side="right")
    with torch.no_grad():
        output = micro_llama(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
        )
    columns = answer_columns(batch["labels"])
    sums, counts = answer_nll(output.logits[:, columns], answer_targets(batch["labels"]))
    assert float(sums.sum() / counts.sum()) == pytest.approx(float(output.loss), rel=1e-5)
    assert int(counts.sum()) == labelled_tokens(batch["labels"])


# ------------------------------------------------------------------------------- order and schedule


def test_each_epoch_shows_every_example_once_in_a_new_order():
    order = example_order(10, 6, 5, seed=1)
    epochs = [order[i] + order[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order == example_order(10, 6, 5, seed=1) != example_order(10, 6, 5, seed=2)
    assert example_order(10, 3, 5, seed=1) == order[:3]


def test_all_arms_see_the_same_tokens_in_the_same_order(
    attach_lora, tokenizer, examples, tmp_path, monkeypatch
):
    shown = {}
    for name, options in {"a": {"rank": 2}, "b": {"rank": 8, "dropout": 0.3}}.items():
        attached, shown[name] = attach_lora(**options), []

        def watched(*, input_ids, _forward=attached.model.forward, _name=name, **rest):
            shown[_name].append(input_ids.tolist())
            return _forward(input_ids=input_ids, **rest)

        monkeypatch.setattr(attached.model, "forward", watched)
        fit(attached, tokenizer, examples, config(), tmp_path / name, seed=5)
    assert shown["a"] == shown["b"]
    assert len(shown["a"]) >= 6  # steps, some in several micro-batches


# -------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("step", [1, 2, 3, 5])
@pytest.mark.parametrize("kill", [KeyboardInterrupt, RuntimeError])  # a signal; a hard kill
def test_a_run_killed_at_any_step_ends_with_the_same_bits(
    attach_lora, tokenizer, examples, tmp_path, step, kill
):
    whole = attach_lora(dropout=0.3)
    straight = fit(whole, tokenizer, examples, config(), tmp_path / "whole", seed=0)
    with pytest.raises(kill):
        fit(
            attach_lora(dropout=0.3),
            tokenizer,
            examples,
            config(),
            tmp_path / "killed",
            0,
            on_progress=killed_after(step, kill),
        )
    torch.manual_seed(99)  # whatever the process drew before must not matter
    resumed = attach_lora(dropout=0.3)
    steps = []
    result = fit(
        resumed,
        tokenizer,
        examples,
        config(),
        tmp_path / "killed",
        0,
        on_progress=lambda m: steps.append(m.step),
    )
    saved = step if kill is KeyboardInterrupt else (step - 1) // 2 * 2
    assert steps == list(range(saved + 1, 7))
    assert same(weights(resumed), weights(whole))
    assert result.losses == straight.losses and result.tokens == straight.tokens
    rows = [json.loads(r) for r in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in rows] == straight.losses


@pytest.mark.parametrize("variant", ["s0", "pt1", "v1", "v3", "v4"])
def test_every_variant_resumes_with_the_same_bits(
    micro_llama, tokenizer, examples, tmp_path, variant
):
    """Also what a variant draws (Gumbel noise) and what it keeps beside its weights."""

    def attach():
        bounds = {"v3": {"spectral_cap": 0.01}, "v1": {"trust_radius": 0.01}}
        options = {"decorrelation": 0.1} if variant in ("pt1", "v1") else {}
        options |= bounds.get(variant, {})
        return bem.attach(
            with_shared_weights(micro_llama), variant, rank=4, chunk_size=8, **options
        )

    whole, killed, resumed = attach(), attach(), attach()
    base = {n: p.clone() for n, p in micro_llama.named_parameters()}
    before = weights(whole)
    straight = fit(whole, tokenizer, examples, config(steps=4), tmp_path / "whole", seed=0)
    with pytest.raises(KeyboardInterrupt):
        fit(killed, tokenizer, examples, config(steps=4), tmp_path / "x", 0, killed_after(3))
    result = fit(resumed, tokenizer, examples, config(steps=4), tmp_path / "x", seed=0)
    assert same(weights(resumed), weights(whole)) and not same(weights(whole), before)
    assert result.losses == straight.losses
    assert all(torch.equal(p, base[n]) for n, p in micro_llama.named_parameters())


def test_an_interrupt_inside_the_update_keeps_the_last_whole_state(
    attach_lora, tokenizer, examples, tmp_path
):
    whole = attach_lora()
    fit(whole, tokenizer, examples, config(), tmp_path / "whole", seed=0)
    attached = attach_lora()

    def interrupted():
        attached.steps += 1
        if attached.steps == 4:
            raise KeyboardInterrupt

    attached.after_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        fit(attached, tokenizer, examples, config(), tmp_path / "x", seed=0)
    assert torch.load(tmp_path / "x" / "state.pt")["step"] == 2
    saved = torch.load(tmp_path / "x" / "state.pt")["trainer"]["adapter"]
    assert same(weights(attached), saved)  # not half of a step
    resumed = attach_lora()
    fit(resumed, tokenizer, examples, config(), tmp_path / "x", seed=0)
    assert same(weights(resumed), weights(whole))


def test_a_finished_run_is_not_trained_again(attach_lora, tokenizer, examples, tmp_path):
    first = attach_lora()
    before = fit(first, tokenizer, examples, config(), tmp_path, seed=0)
    again = attach_lora()
    after = fit(again, tokenizer, examples, config(), tmp_path, 0, on_progress=killed_after(1))
    assert same(weights(first), weights(again))
    assert after == before and again.steps == 0


def test_the_callers_random_state_is_left_alone(attach_lora, tokenizer, examples, tmp_path):
    attached = attach_lora(dropout=0.5)
    torch.manual_seed(7)
    fit(attached, tokenizer, examples, config(), tmp_path, seed=0)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    ("changes", "seed", "rows", "message"),
    [
        ({"learning_rate": 0.02}, 0, 20, r"training\.learning_rate was 0\.01, is 0\.02"),
        ({}, 1, 20, r"seed was 0, is 1"),
        ({}, 0, 19, r"data was [0-9a-f]+, is [0-9a-f]+"),
    ],
)
def test_a_state_of_other_settings_is_refused_with_what_changed(
    attach_lora, tokenizer, examples, tmp_path, changes, seed, rows, message
):
    fit(attach_lora(), tokenizer, examples, config(), tmp_path / "arm", seed=0)
    with pytest.raises(TrainingError, match=rf"arm: .*state\.pt belongs to .*{message}"):
        fit(attach_lora(), tokenizer, examples[:rows], config(**changes), tmp_path / "arm", seed)
    fit(attach_lora(), tokenizer, examples, config(checkpoint_every=3), tmp_path / "arm", seed=0)


def test_a_state_of_another_base_adapter_or_start_is_refused(
    attach_lora, tokenizer, examples, tmp_path
):
    fit(attach_lora(), tokenizer, examples, config(steps=1), tmp_path / "arm", seed=0)
    other = attach_lora()
    other.model.get_base_model().model.norm.weight.data += 1
    with pytest.raises(TrainingError, match=r"base was [0-9a-f]+, is [0-9a-f]+"):
        fit(other, tokenizer, examples, config(steps=1), tmp_path / "arm", seed=0)
    with pytest.raises(TrainingError, match=r"adapter\.rank was 4, is 8"):
        fit(attach_lora(rank=8), tokenizer, examples, config(steps=1), tmp_path / "arm", seed=0)
    warm = attach_lora()
    warm.parameters()[0].data += 1
    with pytest.raises(TrainingError, match=r"begun from other weights"):
        fit(warm, tokenizer, examples, config(steps=1), tmp_path / "arm", seed=0)


def test_half_a_state_is_refused_with_what_to_do(attach_lora, tokenizer, examples, tmp_path):
    fit(attach_lora(), tokenizer, examples, config(steps=1), tmp_path / "arm", seed=0)
    path = tmp_path / "arm" / "state.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrainingError, match=r"arm: .*state\.pt is half written.*Delete it"):
        fit(attach_lora(), tokenizer, examples, config(steps=1), tmp_path / "arm", seed=0)


# ------------------------------------------------------------ when it fails


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_names_arm_and_step_and_gives_back_the_last_good_state(
    attach_lora, tokenizer, examples, tmp_path, where
):
    attached = attach_lora()
    penalty = attached.penalty

    def poisoned():
        if attached.steps < 3:
            return penalty()
        zero = attached.parameters()[0].sum() * 0
        # d sqrt(x)/dx at 0 is inf, times 0 is nan: a finite loss with a gradient that is not
        return zero + math.nan if where == "loss" else (zero**2).sqrt()

    attached.penalty = poisoned
    what = "loss" if where == "loss" else "gradient norm"
    message = rf"v1: the {what} was nan in step 4.*\(now 0\.01\).* Kept the state after step 2\."
    with pytest.raises(Diverged, match=message):
        fit(attached, tokenizer, examples, config(), tmp_path / "v1", seed=0)
    good = attach_lora()
    with pytest.raises(KeyboardInterrupt):
        fit(good, tokenizer, examples, config(), tmp_path / "good", 0, killed_after(2))
    assert same(weights(attached), weights(good))
    assert torch.load(tmp_path / "v1" / "state.pt")["step"] == 2


def test_a_full_disk_is_a_training_error_and_leaves_the_last_state_whole(
    attach_lora, tokenizer, examples, tmp_path, monkeypatch
):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:  # file and folder of: first state, metrics, step 2; not of step 4
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = "no space is left. The state after step 2 is whole"
    with pytest.raises(TrainingError, match=message):
        fit(attach_lora(), tokenizer, examples, config(), tmp_path / "arm", seed=0)
    assert not list((tmp_path / "arm").glob(".*"))
    monkeypatch.undo()
    resumed, whole = attach_lora(), attach_lora()
    fit(resumed, tokenizer, examples, config(), tmp_path / "arm", seed=0)
    fit(whole, tokenizer, examples, config(), tmp_path / "whole", seed=0)
    assert same(weights(resumed), weights(whole))


def test_bad_input_stops_before_the_first_step(attach_lora, tokenizer, examples, tmp_path):
    with pytest.raises(TrainingError, match="no training examples"):
        fit(attach_lora(), tokenizer, [], config(), tmp_path / "arm", seed=0)
    long = Example("long", "?", ("0123456789" * 20,))
    with pytest.raises(DataError, match="'long'"):
        fit(attach_lora(), tokenizer, [long], config(max_length=64), tmp_path / "arm", seed=0)
    assert not (tmp_path / "arm").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot use"):
        fit(attach_lora(), tokenizer, examples, config(), tmp_path / "file" / "arm", seed=0)


def test_bfloat16_trains_and_keeps_float32_weights(attach_lora, tokenizer, examples, tmp_path):
    attached = attach_lora()
    settings = config(steps=30, precision="bfloat16")
    result = fit(attached, tokenizer, examples[:4], settings, tmp_path, seed=0)
    assert result.final_loss < 0.8 * result.losses[0]
    assert all(p.dtype == torch.float32 for p in attached.parameters())


@pytest.mark.parametrize("variant", ["s0", "v1"])
def test_a_base_in_bfloat16_trains_and_resumes_with_the_same_bits(variant, tmp_path):
    """Weights of the adapter stay float32; those of the base stay as they are."""
    runs = []
    for folder, kill in (("whole", None), ("killed", 3), ("killed", None)):
        base, words = bem.load_base("bem-tiny", dtype="bfloat16")
        rows = [Example(str(i), f"def {WORDS[i]}(self):", (WORDS[i],)) for i in range(8)]
        attached = bem.attach(base, variant, rank=4)
        frozen = {n: p.clone() for n, p in base.named_parameters() if not p.requires_grad}
        settings = config(steps=8, learning_rate=0.02, max_length=64)
        given = (attached, words, rows, settings, tmp_path / folder, 0)
        if kill:
            with pytest.raises(RuntimeError):
                fit(*given, killed_after(kill, RuntimeError))
            continue
        result = fit(*given)
        runs.append((result.losses, weights(attached)))
        assert result.losses[-1] < 0.7 * result.losses[0]
        assert all(torch.equal(p, frozen[n]) for n, p in base.named_parameters() if n in frozen)
    assert base.dtype == torch.bfloat16 and frozen
    assert all(p.dtype == torch.float32 for p in attached.parameters())
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
