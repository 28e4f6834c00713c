"""Labels lie on answers and nowhere else; what a model cannot take is refused."""

import string

import pytest
from tokenizers import Tokenizer, models
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from bem.errors import DataError, MeasurementError, TrainingError
from bem.training.data import (
    IGNORED,
    Encoded,
    Example,
    check_fits,
    collate,
    context_length,
    encode,
    end_of_turn,
)
from tests.conftest import make_llama

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chatty(tokenizer):
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    return tokenizer


def test_only_the_answer_and_its_end_are_labelled(tokenizer):
    encoded = encode(Example("1", "2+2?", ("four",), instruction="Count."), tokenizer, 512)
    ids = tokenizer("User: Count.\n2+2?\nAssistant:")["input_ids"]
    answer = [*tokenizer(" four")["input_ids"], tokenizer.eos_token_id]
    assert encoded.input_ids == ids + answer
    assert encoded.labels == [IGNORED] * len(ids) + answer
    assert encoded.prompt_length == len(ids)
    assert [i for i, s in enumerate(encoded.turn_starts) if s] == [len(ids) - 1]
    assert encode(Example("1", "2+2?", ("four",), instruction="Count."), tokenizer, 512, False) == (
        Encoded(ids, [IGNORED] * len(ids), len(ids), [False] * len(ids))
    )


def test_answers_of_earlier_turns_are_labelled_when_asked(tokenizer):
    tokenizer = chatty(tokenizer)
    example = Example("1", "u2", ("a2",), history=(("u0", "a0"), ("u1", "a1")))
    encoded = encode(example, tokenizer, 512)
    assert tokenizer.decode(encoded.input_ids) == (
        "<|user|>u0<|assistant|>a0<eos><|user|>u1<|assistant|>a1<eos><|user|>u2<|assistant|>a2<eos>"
    )
    labelled = [i for i in encoded.labels if i != IGNORED]
    assert tokenizer.decode(labelled) == "a0<eos>a1<eos>a2<eos>"
    starts = [i for i, s in enumerate(encoded.turn_starts) if s]
    assert [tokenizer.decode([encoded.input_ids[i]]) for i in starts] == ["<|assistant|>"] * 3
    last_only = encode(example, tokenizer, 512, train_history=False)
    assert tokenizer.decode([i for i in last_only.labels if i != IGNORED]) == "a2<eos>"
    assert last_only.turn_starts == encoded.turn_starts
    assert encoded.prompt_length == starts[-1] + 1


def test_turns_start_where_the_adapter_reads_them_from_the_labels(tokenizer):
    from bem.control.chunks import turns_from_labels

    rows = [
        Example("1", "u2", ("a2",), history=(("u0", "a0"), ("u1", "a1"))),
        Example("2", "a longer question than the other has", ("a",)),
    ]
    batch = collate([encode(row, tokenizer, 512) for row in rows], 0)
    assert batch["turn_starts"].sum(1).tolist() == [3, 1]
    assert batch["turn_starts"].equal(turns_from_labels(batch["labels"]))


def test_a_template_that_rewrites_history_gives_context_only(tokenizer):
    tokenizer = chatty(tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
    encoded = encode(Example("1", "u1", ("a1",), history=(("u0", "a0"),)), tokenizer, 512)
    assert tokenizer.decode(encoded.input_ids) == (
        "<|user|>U0<|assistant|>A0<eos><|user|>U1<|assistant|>a1<eos>"
    )
    assert tokenizer.decode([i for i in encoded.labels if i != IGNORED]) == "a1<eos>"


def test_the_end_of_an_answer_is_the_templates_own_mark(tokenizer):
    tokenizer = chatty(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]}, False)
    tokenizer.chat_template = TEMPLATE.replace("<eos>", "<|end|>\n")
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|end|>"
    encoded = encode(Example("1", "u1", ("a1",), history=(("u0", "a0"),)), tokenizer, 512)
    assert tokenizer.decode(encoded.input_ids) == (
        "<|user|>u0<|assistant|>a0<|end|>\n<|user|>u1<|assistant|>a1<|end|>"
    )
    assert tokenizer.decode([i for i in encoded.labels if i != IGNORED]) == "a0<|end|>a1<|end|>"


def test_a_long_prompt_loses_its_beginning_but_not_its_bos_nor_its_answer(tokenizer):
    tokenizer = chatty(tokenizer)
    tokenizer.bos_token = "<eos>"
    tokenizer.chat_template = "<eos>" + TEMPLATE
    example = Example("1", " ".join(str(i) for i in range(200)), ("done",))
    whole = encode(example, tokenizer, 4096)
    cut = encode(example, tokenizer, 64)
    assert len(cut) == 64
    assert cut.input_ids == [whole.input_ids[0], *whole.input_ids[-63:]]
    assert [i for i in cut.labels if i != IGNORED] == [i for i in whole.labels if i != IGNORED]
    assert cut.input_ids[cut.prompt_length :] == whole.input_ids[whole.prompt_length :]
    assert len(encode(example, tokenizer, 64, with_answer=False)) == 64


def test_an_earlier_answer_that_is_cut_open_is_not_labelled(tokenizer):
    example = Example("1", "u", ("a",), history=(("x" * 20, "early answer of some length"),))
    whole = encode(example, tokenizer, 512)
    inside = whole.turn_starts.index(True) + 2
    cut = encode(example, tokenizer, len(whole) - inside)
    assert cut.turn_starts.count(True) == 1
    labelled = [i for i, label in enumerate(cut.labels) if label != IGNORED]
    assert labelled == list(range(cut.prompt_length, len(cut)))


def test_an_answer_that_does_not_fit_names_the_row_and_the_numbers(tokenizer):
    answer = "0123456789" * 3
    n = len(tokenizer(" " + answer)["input_ids"]) + 1
    mark = len(tokenizer("\nAssistant:")["input_ids"])
    assert len(encode(Example("r7", "?", (answer,)), tokenizer, n + mark)) == n + mark
    with pytest.raises(DataError, match=rf"'r7': its answer has {n} tokens, but only {n - 1} fit"):
        encode(Example("r7", "?", (answer,)), tokenizer, n + mark - 1)


def test_padding_goes_left_or_right_and_positions_count_real_tokens():
    long = Encoded([5, 6, 7], [IGNORED, 6, 7], 1, [False, True, False])
    short = Encoded([8, 9], [IGNORED, 9], 1, [False, True])
    left, right = collate([long, short], 0), collate([long, short], 0, side="right")
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 8, 9]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert left["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, 9]]
    assert left["turn_starts"].tolist() == [[False, True, False], [False, False, True]]
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert right["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]


GOOD = (1.0, 0.9, 0.7, 0.2, 0.0, 0.8, 0.9, 0.3)


def test_what_is_known_of_the_evidence_goes_into_the_batch(tokenizer):
    rows = [Example("1", "a", ("b",), relevance=GOOD), Example("2", "c", ("d",))]
    encoded = [encode(row, tokenizer, 64) for row in rows]
    batch = collate(encoded, 0)
    assert batch["evidence"].tolist() == [pytest.approx(GOOD), [0.0] * 8]
    assert "evidence" not in collate(encoded[1:], 0)


# --- what cannot be encoded, or does not fit --------------------------------------------------------


def test_a_row_without_references_teaches_to_end_the_answer_at_once(tokenizer):
    encoded = encode(Example("1", "unanswerable?", ()), tokenizer, 512)
    labelled = [label for label in encoded.labels if label != IGNORED]
    assert labelled == [*tokenizer(" ")["input_ids"], tokenizer.eos_token_id]


def test_a_system_message_opens_the_conversation(tokenizer):
    row = Example("1", "u1", ("a1",), history=(("u0", "a0"),), system="be brief")
    plain = tokenizer.decode(encode(row, tokenizer, 512).input_ids)
    assert plain.startswith("be brief\nUser: u0\nAssistant: a0<eos>User: u1\n")
    chat = chatty(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<|system|>"]}, False)
    assert chat.decode(encode(row, chat, 512).input_ids) == (
        "<|system|>be brief<|user|>u0<|assistant|>a0<eos><|user|>u1<|assistant|>a1<eos>"
    )


def test_what_cannot_be_encoded_names_its_row(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + TEMPLATE
    )
    row = Example("r7", "u", ("a",), system="s")
    with pytest.raises(DataError, match=r"Row 'r7': .* chat template refuses .*system, user"):
        encode(row, tokenizer, 64)
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(DataError, match="Row 'r7': the base's chat template writes nothing"):
        encode(Example("r7", "u", ("a",)), tokenizer, 64)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"Row 'r7': max_length 1 is less than the \d+ tokens"):
        encode(Example("r7", "u", ("a",)), tokenizer, 1, with_answer=False)
    with pytest.raises(DataError, match=r"Row 'r7': meta.route must name one .* each of 1 turns"):
        encode(Example("r7", "u", ("a",), meta={"route": 1}), tokenizer, 64)
    with pytest.raises(DataError, match=r"Row 'r7': the tokenizer has no token for ' ?猫'"):
        encode(Example("r7", "u", ("猫",)), ascii_letters(), 64)


def ascii_letters():
    """A tokenizer of single ASCII characters that drops all others."""
    vocabulary = {letter: i for i, letter in enumerate(["<eos>", *string.printable.strip()])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def test_rows_that_do_not_fit_a_model_are_refused_with_both_numbers(tokenizer):
    row = encode(Example("1", "word " * 60, ("x",)), tokenizer, 64)
    small = make_llama(max_position_embeddings=32)
    with pytest.raises(TrainingError, match=r"64 tokens, the model has 32 positions.*max_length"):
        check_fits(small, tokenizer, [row])
    check_fits(make_llama(max_position_embeddings=64), tokenizer, [row])
    with pytest.raises(MeasurementError, match=r"64 tokens and 40 new ones, .* 100 positions"):
        check_fits(make_llama(max_position_embeddings=100), tokenizer, [row], 40, MeasurementError)
    assert context_length(small) == 32
    check_fits(small, tokenizer, [])
    alibi = BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=16, n_layer=1, n_head=2))
    assert context_length(alibi) is None
    check_fits(alibi, tokenizer, [row])


def test_a_token_without_an_embedding_is_refused_with_both_sizes(tokenizer):
    row = encode(Example("1", "hi", ("x",)), tokenizer, 64)
    with pytest.raises(TrainingError, match=r"the model has 50 entries, the tokenizer 3\d\d"):
        check_fits(make_llama(vocab_size=50), tokenizer, [row])
    # a tokenizer may have entries to spare, as long as no row uses them
    check_fits(make_llama(vocab_size=max(row.input_ids) + 1), tokenizer, [row])
