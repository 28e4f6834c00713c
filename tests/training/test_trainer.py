"""A step is a function of (weights, optimiser, seed, step, batch), and happens whole or not at all."""

import contextlib
import copy
import math

import pytest
import torch

import bem
from bem.adapters.copies import with_shared_weights
from bem.config import EVIDENCE_FEATURES, TrainingConfig
from bem.errors import Diverged, TrainingError
from bem.training.batches import micro_batches
from bem.training.data import Example, encode
from bem.training.trainer import StepResult, Trainer
from tests.conftest import make_llama
from tests.routing.mounted import mounted

WORDS = ["name", "the", "function", "that", "this", "docstring", "describes", "return", "value"]


def config(**changes):
    return TrainingConfig(
        **{"steps": 6, "batch_size": 4, "learning_rate": 0.01, "warmup": 0.0, **changes}
    )


@pytest.fixture
def batches(tokenizer):
    """Six batches of three rows of different lengths."""
    rows = [
        Example(str(i), " ".join(WORDS[: 2 + i % 5]), (" ".join(WORDS[: 1 + i % 4]),))
        for i in range(18)
    ]
    encoded = [encode(row, tokenizer, 128) for row in rows]
    return [encoded[i : i + 3] for i in range(0, 18, 3)]


def weights(attached):
    return {k: v.clone() for k, v in attached.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------- what it does


def test_a_step_is_adamw_on_the_mean_loss_and_the_penalty(attach_lora, tokenizer, batches):
    attached, by_hand = attach_lora(penalty=0.1), attach_lora(penalty=0.1)
    result = Trainer(attached, tokenizer, config(clip=1e9), seed=0).step(batches[0])
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01, weight_decay=0.0)
    total, count = torch.zeros(()), 0
    for row in batches[0]:  # one by one, without padding
        logits = by_hand.model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for t in range(row.prompt_length, len(row)):
            total, count = total - logits[t - 1, row.input_ids[t]], count + 1
    loss = total / count
    (loss + by_hand.penalty()).backward()
    norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm()
    assert isinstance(result, StepResult) and result.step == 1
    assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert result.penalty == pytest.approx(float(by_hand.penalty().detach()), rel=1e-5)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert result.learning_rate == 0.01 and result.tokens == sum(map(len, batches[0]))
    optimizer.step()
    assert attached.steps == 1  # after_step was called
    expected = weights(by_hand)
    for name, value in weights(attached).items():
        # AdamW's first step moves every weight by the rate, whatever its gradient: signs must agree
        moved = (value - expected[name]).abs() > 1e-4
        assert moved.float().mean() < 0.01, name


def test_the_penalty_and_the_bounds_of_a_variant_act_in_every_step(tokenizer, batches):
    """V3's spectral cap is kept by after_step alone."""
    attached = bem.attach(make_llama(), "v3", rank=4, spectral_cap=0.01)
    trainer = Trainer(attached, tokenizer, config(learning_rate=0.5), seed=0)
    for batch in batches:
        trainer.step(batch)
        for module in attached.modules():
            terms = [
                torch.kron(a, b) for a, b in zip(module.a.detach(), module.b.detach(), strict=True)
            ]
            norm = torch.linalg.matrix_norm(torch.stack(terms).sum(0), 2)
            assert norm * getattr(module, "scale", 1.0) <= 0.01 * 1.002


@pytest.mark.parametrize("variant", ["s0", "pt1", "v1-random", "v2", "v3", "v4"])
def test_a_step_is_the_same_however_its_rows_are_cut(tokenizer, variant):
    """Also where evidence is known of some rows alone; the padding is what the cut saves."""
    made = [
        Example(
            str(i),
            " ".join(WORDS[:3] * (1 + 2 * (i % 4))),
            (" ".join(WORDS[: 1 + i % 3]),),
            relevance=(1.0, 0.3, *[0.5] * (len(EVIDENCE_FEATURES) - 2)) if i % 3 else (),
            history=(("name", "the value"),) if i % 2 else (),
        )
        for i in range(8)
    ]
    batch = [encode(row, tokenizer, 256) for row in made]
    kind, _, mask = variant.partition("-")
    results, after = [], []
    for settings in ({"padding": 1.0}, {"padding": 0.1}, {"padding": 0.0}, {"accumulation": 8}):
        options = {"mask": mask} if mask else {}
        attached = bem.attach(make_llama(), kind, rank=4, **options)
        start = torch.Generator().manual_seed(3)
        for p in attached.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=start)
        passes = []
        attached.model.register_forward_pre_hook(lambda *_, seen=passes: seen.append(1))
        trainer = Trainer(attached, tokenizer, config(clip=1e9, **settings), seed=0)
        results.append(trainer.step(batch))
        after.append([m["exp_avg"] for m in trainer.optimizer.state_dict()["state"].values()])
        lengths = [len(row) for row in batch]
        groups = micro_batches(lengths, settings.get("accumulation", 1), trainer.config.padding)
        assert len(passes) == len(groups)
    one = results[0]
    assert one.padding > 0.3 and results[1].padding <= 0.1 and results[2].padding == 0.0
    assert (one.penalty > 0) == (variant == "v2")
    for result, moments in zip(results[1:], after[1:], strict=True):
        assert result.loss == pytest.approx(one.loss, rel=1e-5)
        assert result.penalty == pytest.approx(one.penalty, rel=1e-5)
        assert result.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        for mine, whole in zip(moments, after[0], strict=True):  # a tenth of the gradients
            torch.testing.assert_close(mine, whole, rtol=1e-3, atol=1e-6)


def test_beyond_the_schedule_the_rate_stays_at_its_last_value(attach_lora, tokenizer, batches):
    trainer = Trainer(attach_lora(), tokenizer, config(steps=2), seed=0)
    rates = [trainer.step(batch).learning_rate for batch in batches[:4]]
    assert rates == pytest.approx([0.01, 0.001, 0.001, 0.001])


def test_between_steps_the_model_is_as_it_was(attach_lora, tokenizer, batches):
    attached = attach_lora(dropout=0.5)
    ids = torch.tensor([batches[0][0].input_ids])
    Trainer(attached, tokenizer, config(), seed=0).step(batches[0])
    assert not any(m.training for m in attached.model.modules())
    with torch.no_grad():
        assert torch.equal(attached.model(ids).logits, attached.model(ids).logits)


def test_a_step_is_taken_in_training_mode_whatever_the_wrapper_says(
    micro_llama, tokenizer, batches
):
    """PEFT's wrapper is born in training mode around a base in evaluation mode."""
    attached = bem.attach(micro_llama, "v1", rank=4)
    assert attached.model.training and not attached.base.training
    seen = []
    for module in attached.modules():
        module.register_forward_pre_hook(lambda m, _: seen.append(m.training))
    attached.base.model.register_forward_pre_hook(lambda m, _: seen.append(m.training))
    Trainer(attached, tokenizer, config(), seed=0).step(batches[0])
    assert seen and all(seen) and not attached.base.training


@pytest.mark.parametrize("variant", ["s0", "pt1", "v1", "v2", "v3", "v4", "experts"])
def test_nothing_below_the_router_layer_is_kept_for_backward(tokenizer, batches, variant):
    """No graph and no saved tensor: the lower blocks cost what they cost without training."""
    model = make_llama()
    with contextlib.ExitStack() as stack:
        if variant == "experts":
            attached = mounted(model)
            stack.enter_context(attached.training("experts"))
        else:
            attached = bem.attach(model, variant, rank=2, router_layer=1)
        blocks, kept, inside = model.model.layers, dict.fromkeys(range(4), 0), [-1]
        entered = {}
        for i, block in enumerate(blocks):

            def enter(_, args, given, i=i):
                inside[0] = i
                entered[i] = (args[0] if args else given["hidden_states"]).requires_grad

            block.register_forward_pre_hook(enter, with_kwargs=True)
            block.register_forward_hook(lambda *_: inside.__setitem__(0, -1))

        def pack(tensor):
            if inside[0] >= 0:
                kept[inside[0]] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            Trainer(attached, tokenizer, config(), seed=0).step(batches[0])
    assert kept[0] == 0 < kept[1] and not entered[0] and not entered[1] and entered[2]


def test_a_gradient_that_somebody_left_behind_has_no_part_in_the_step(
    attach_lora, tokenizer, batches
):
    clean, dirty = attach_lora(), attach_lora()
    trainers = [Trainer(each, tokenizer, config(), seed=0) for each in (clean, dirty)]
    for parameter in dirty.parameters():
        parameter.grad = torch.ones_like(parameter)
    for trainer in trainers:
        trainer.step(batches[0])
    assert same(weights(clean), weights(dirty))
    assert all(p.grad is None for p in dirty.parameters())


def test_a_shadow_copy_is_trained_while_the_live_one_answers_unchanged(
    micro_llama, tokenizer, batches
):
    live = bem.attach(micro_llama, "s0", rank=4)
    shadow = bem.attach(with_shared_weights(make_llama()), "s0", rank=4)
    ids = torch.tensor([batches[0][0].input_ids])
    with torch.no_grad():
        before = live.model(ids).logits
        trainer = Trainer(shadow, tokenizer, config(), seed=0)
    for batch in batches[:2]:
        trainer.step(batch)
    with torch.no_grad():
        assert torch.equal(live.model(ids).logits, before)
    assert trainer.steps == 2


# ---------------------------------------------------------------------------------------- its state


def test_also_what_no_checkpoint_holds_goes_on_with_the_same_bits(tokenizer, batches):
    """V3's power iteration starts where the last one ended."""

    def trainer():
        attached = bem.attach(make_llama(), "v3", rank=4, spectral_cap=0.01)
        return Trainer(attached, tokenizer, config(learning_rate=0.3), seed=0)

    whole, first, second = trainer(), trainer(), trainer()
    for batch in batches:
        whole.step(batch)
    for batch in batches[:3]:
        first.step(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        second.step(batch)
    assert same(weights(whole.attached), weights(second.attached))


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_state_loaded_into_a_new_trainer_goes_on_with_the_same_bits(
    attach_lora, tokenizer, batches, at
):
    first = attach_lora(dropout=0.3)
    trainer = Trainer(first, tokenizer, config(), seed=7)
    state, losses = None, []
    for step, batch in enumerate(batches):
        if step == at:
            state = trainer.state_dict()
        losses.append(trainer.step(batch).loss)
    torch.manual_seed(99)  # whatever the process drew before must not matter
    second = attach_lora(dropout=0.3)
    again = Trainer(second, tokenizer, config(), seed=7)
    kept = copy.deepcopy(state)
    again.load_state_dict(state)
    assert [again.step(batch).loss for batch in batches[at:]] == losses[at:]
    assert same(weights(first), weights(second))
    assert same(state["adapter"], kept["adapter"])  # neither trainer wrote to it
    moments = [entry["exp_avg"] for entry in state["optimizer"]["state"].values()]
    others = [entry["exp_avg"] for entry in kept["optimizer"]["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, others, strict=True))


def test_a_state_of_other_parameters_or_another_seed_is_refused(attach_lora, tokenizer):
    state = Trainer(attach_lora(), tokenizer, config(), seed=0).state_dict()
    with pytest.raises(TrainingError, match=r"made with seed 0, this is seed 1"):
        Trainer(attach_lora(), tokenizer, config(), seed=1).load_state_dict(state)
    other = attach_lora()
    other.parameters()[0].requires_grad = False
    with pytest.raises(TrainingError, match=r"12 trained tensors, here are 11|differ in"):
        Trainer(other, tokenizer, config(), seed=0).load_state_dict(state)


def test_no_state_can_be_taken_of_a_step_that_was_cut_short(attach_lora, tokenizer, batches):
    attached = attach_lora()
    trainer = Trainer(attached, tokenizer, config(), seed=0)
    state = trainer.state_dict()

    def interrupted():
        raise KeyboardInterrupt

    attached.after_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.step(batches[0])
    with pytest.raises(TrainingError, match="cut short"):
        trainer.state_dict()
    trainer.load_state_dict(state)
    assert same(trainer.state_dict()["adapter"], state["adapter"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_diverges_is_not_taken(attach_lora, tokenizer, batches, where):
    attached = attach_lora()
    trainer = Trainer(attached, tokenizer, config(), seed=0)
    trainer.step(batches[0])
    before, whole = weights(attached), trainer.state_dict()

    def poisoned():  # of every micro-batch, each with a graph of its own
        zero = attached.parameters()[0].sum() * 0
        # d sqrt(x)/dx at 0 is inf, times 0 is nan: a finite loss with a gradient that is not
        return zero + math.nan if where == "loss" else (zero**2).sqrt()

    attached.penalty = poisoned
    with pytest.raises(Diverged, match=r"was nan in step 2, which was not taken.*\(now 0\.01\)"):
        trainer.step(batches[1])
    assert same(weights(attached), before) and trainer.steps == 1
    assert all(p.grad is None for p in attached.parameters())
    assert trainer.state_dict()["steps"] == whole["steps"]


# --------------------------------------------------------------------------- what cannot be trained


def test_what_was_loaded_frozen_is_refused_with_the_way_out(micro_llama, tokenizer, tmp_path):
    bem.attach(micro_llama, "s0", rank=2).save(tmp_path)
    frozen = bem.load(make_llama(), tmp_path)
    with pytest.raises(TrainingError, match=r"frozen.*bem\.load\(.*trainable=True\)"):
        Trainer(frozen, tokenizer, config(), seed=0)
    Trainer(bem.load(make_llama(), tmp_path, trainable=True), tokenizer, config(), seed=0)


def test_a_mounted_stack_outside_of_its_training_is_refused_with_the_way_out(tokenizer, batches):
    routed = mounted(make_llama())
    with pytest.raises(TrainingError, match=r"mounted\.training\('experts'\)"):
        Trainer(routed, tokenizer, config(), seed=0)
    with routed.training("experts"):
        assert Trainer(routed, tokenizer, config(), seed=0).step(batches[0]).loss > 0


def test_a_router_is_not_trained_by_the_likelihood_of_answers(tokenizer, batches):
    routed = mounted(make_llama())
    with routed.training("router"):
        trainer = Trainer(routed, tokenizer, config(), seed=0)
        with pytest.raises(TrainingError, match=r"depends on none of its .*clone, improve"):
            trainer.step(batches[0])


def test_training_without_gradients_is_refused_with_the_way_out(attach_lora, tokenizer, batches):
    trainer = Trainer(attach_lora(), tokenizer, config(), seed=0)
    with torch.no_grad(), pytest.raises(TrainingError, match=r"outside torch\.no_grad"):
        trainer.step(batches[0])
    with torch.inference_mode():
        attached = bem.attach(make_llama(), "s0", rank=2)
    with pytest.raises(TrainingError, match="inference_mode"):
        Trainer(attached, tokenizer, config(), seed=0)


def test_rows_without_an_answer_are_refused(attach_lora, tokenizer):
    prompt = encode(Example("a", "name", ("x",)), tokenizer, 64, with_answer=False)
    trainer = Trainer(attach_lora(), tokenizer, config(), seed=0)
    for rows in ([], [prompt, prompt]):
        with pytest.raises(TrainingError, match=f"{len(rows)} rows without a single answer token"):
            trainer.step(rows)


def test_rows_that_the_model_cannot_take_are_refused_before_the_step(
    attach_lora, tokenizer, batches
):
    attached = attach_lora()
    trainer = Trainer(attached, tokenizer, config(), seed=0)
    before = weights(attached)
    long = encode(Example("a", "word " * 600, ("x",)), tokenizer, 600)
    with pytest.raises(TrainingError, match="600 tokens, the model has 512 positions"):
        trainer.step([*batches[0], long])
    batches[0][0].input_ids[0] = 5000
    with pytest.raises(TrainingError, match=r"token 5000 .*320 entries"):
        trainer.step(batches[0])
    assert same(weights(attached), before) and trainer.steps == 0
