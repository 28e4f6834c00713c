"""A model as it is meant to be used: its chat template, system messages, one token that both ends and pads."""

import pytest
import torch
from tokenizers import AddedToken

import bem
from bem.config import TrainingConfig
from bem.training.answers import ends_of, greedy_answers
from bem.training.chat import chat_form, end_of_turn
from bem.training.data import IGNORED, collate, encode, examples_from_rows
from bem.training.trainer import Trainer
from tests.conftest import make_llama, make_tokenizer

CHATML = (  # as SmolLM2 has it, with a system message of its own where none is given
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nname the value<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "return the value"},
    {"role": "user", "content": "name this"},
    {"role": "assistant", "content": "the function"},
    {"role": "user", "content": "and that"},
    {"role": "assistant", "content": "the docstring"},
]


@pytest.fixture
def chatml():
    """Pad and end of a turn are one token, which ends texts too."""
    tokenizer = make_tokenizer()
    marks = [AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    return tokenizer


def read(*rows):
    return examples_from_rows([(f"row {i}", row) for i, row in enumerate(rows)])


def test_the_conversation_is_the_templates_own_whatever_form_the_row_has(chatml):
    rows = read(
        {"messages": MESSAGES},
        {
            "system": "return the value",
            "history": [["name this", "the function"]],
            "input": "and that",
            "references": ["the docstring"],
        },
        {"prompt": MESSAGES[:4], "completion": "the docstring"},
    )
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    whole = chatml.apply_chat_template(MESSAGES, tokenize=False)
    for row in rows:
        encoded = encode(row, chatml, 256)
        assert chatml.decode(encoded.input_ids) == whole.removesuffix("\n")
        assert encoded.labels.count(end) == 2  # the end of both answers is learnt
        learnt = chatml.decode([label for label in encoded.labels if label != IGNORED])
        assert learnt == "the function<|im_end|>the docstring<|im_end|>"


def test_without_a_system_message_the_templates_own_stands(chatml):
    (row,) = read({"input": "and that", "references": ["the docstring"]})
    asked = chatml.decode(encode(row, chatml, 256, with_answer=False).input_ids)
    assert asked == chatml.apply_chat_template(
        [{"role": "user", "content": "and that"}], tokenize=False, add_generation_prompt=True
    )
    assert "name the value" in asked


def test_the_end_is_learnt_and_padding_is_not_where_they_are_one_token(chatml):
    end = end_of_turn(chatml)
    assert end == chatml.pad_token_id == chatml.eos_token_id and chat_form(chatml).bos is None
    rows = read(
        {"messages": MESSAGES}, {"messages": [MESSAGES[1], MESSAGES[2]]}, {"messages": MESSAGES[1:]}
    )
    encoded = [encode(row, chatml, 256) for row in rows]
    batch = collate(encoded, end)
    assert [(row == end).sum() for row in batch["labels"]] == [2, 1, 2]
    for row, mask, e in zip(batch["labels"], batch["attention_mask"], encoded, strict=True):
        assert mask.sum() == len(e) and (row[mask == 0] == IGNORED).all()
        assert (row[mask == 1] == torch.tensor(e.labels)).all()


def test_the_loss_of_a_step_counts_the_end_of_every_answer(chatml):
    rows = read({"messages": MESSAGES}, {"messages": [MESSAGES[1], MESSAGES[2]]})
    encoded = [encode(row, chatml, 256) for row in rows]
    model = make_llama(vocab_size=len(chatml))
    total = count = 0
    for row in encoded:
        with torch.no_grad():
            log_p = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for t, label in enumerate(row.labels):
            if label != IGNORED:
                total, count = total - float(log_p[t - 1, label]), count + 1
    assert (
        count
        == sum(len(chatml(t)["input_ids"]) + 1 for t in ("the function",) * 2)
        + len(chatml("the docstring")["input_ids"])
        + 1
    )
    attached = bem.attach(model, "s0", rank=2)
    trainer = Trainer(attached, chatml, TrainingConfig(padding=1.0), seed=0)
    assert trainer.step(encoded).loss == pytest.approx(total / count, rel=1e-5)


def test_answers_of_a_batch_stop_at_the_end_of_the_turn_each_at_its_own(chatml):
    """The learnt end stops an answer; rows that are done are filled with the same token."""
    rows = read(
        {"messages": [MESSAGES[1], MESSAGES[2]]},
        {"messages": [MESSAGES[3], {"role": "assistant", "content": "return the value this time"}]},
        {"messages": MESSAGES},
    )
    attached = bem.attach(make_llama(vocab_size=len(chatml)), "s0", rank=8, router_layer=0)
    config = TrainingConfig(steps=150, learning_rate=0.03, warmup=0.1)
    trainer = Trainer(attached, chatml, config, seed=0)
    attached.base.lm_head.weight.data *= 10  # logits of a size that training can move
    encoded = [encode(row, chatml, 256) for row in rows]
    for _ in range(150):
        trainer.step(encoded)
    attached.model.eval()
    attached.base.generation_config.eos_token_id = None  # the base's own file names no end
    prompts = [encode(row, chatml, 256, with_answer=False) for row in rows]
    answers = greedy_answers(attached.model, chatml, prompts, 30)
    assert [chatml.decode(ids) for ids in answers] == [row.answer for row in rows]
    assert ends_of(attached.model, chatml) == [end_of_turn(chatml)]
    alone = [greedy_answers(attached.model, chatml, [prompt], 30)[0] for prompt in prompts]
    assert alone == answers
