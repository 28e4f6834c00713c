"""Rows are read whole or not at all; labels lie on answers and nowhere else."""

import gzip
import json

import pytest

from bem.errors import DataError
from bem.training.data import (
    IGNORED,
    Encoded,
    Example,
    collate,
    data_hash,
    encode,
    end_of_turn,
    load_hf,
    read_jsonl,
)

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write(path, *rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def chatty(tokenizer):
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    return tokenizer


# -------------------------------------------------------------------------------------------- files


def test_rows_keep_their_fields_and_get_an_id_and_a_group(tmp_path):
    rows = [
        {"input": "a?", "references": ["b", "c"], "evidence": ["e0", "e1"], "gold_evidence": [1]},
        {"id": "x", "input": "d?", "references": "f", "group": "doc", "history": [["u", "v"]]},
    ]
    first, second = read_jsonl(write(tmp_path / "t.jsonl", *rows), task="t", instruction="Say.")
    assert (first.id, first.group, first.task, first.instruction) == ("t-1", "t-1", "t", "Say.")
    assert first.references == ("b", "c") and first.gold_evidence == (1,)
    assert first.prompt == "Say.\ne0\ne1\na?"
    assert (second.id, second.group, second.references) == ("x", "doc", ("f",))
    assert second.history == (("u", "v"),)


def test_gzip_and_plain_hold_the_same_rows(tmp_path):
    line = json.dumps({"id": "1", "input": "ä", "references": ["ö"]})
    plain = write(tmp_path / "a.jsonl", line + "\n\n")
    packed = tmp_path / "a.jsonl.gz"
    with gzip.open(packed, "wt", encoding="utf-8") as file:
        file.write(line)
    assert data_hash(read_jsonl(plain)) == data_hash(read_jsonl(packed))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        (["\n \n"], "holds no rows"),
        ([{"input": "a", "references": ["b"]}, "{oops\n"], r"t\.jsonl:2: not JSON: .* column 2"),
        (["[1]\n"], r"t\.jsonl:1: a row must be a JSON object, found list"),
        ([{"input": "a"}], r"t\.jsonl:1: missing references \(the row has input\)"),
        ([{"references": ["b"]}], r"t\.jsonl:1: missing input"),
        ([{"input": "a", "references": []}], r"t\.jsonl:1: references is empty"),
        ([{"input": "a", "references": [3]}], r"t\.jsonl:1: references must be a list of texts"),
        ([{"input": 3, "references": ["b"]}], r"t\.jsonl:1: input must be text, found int"),
        (
            [{"input": "a", "references": ["b"], "evidence": ["e"], "gold_evidence": [1]}],
            r"t\.jsonl:1: gold_evidence \[1\] must be indices into 1 evidence",
        ),
        ([{"input": "a", "references": ["b"], "history": [["u"]]}], r"t\.jsonl:1: history"),
        (
            [{"id": 7, "input": "a", "references": ["b"]}] * 2,
            r":2: id '7' was used before, in .*:1",
        ),
    ],
)
def test_a_bad_file_is_refused_with_file_and_line(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_jsonl(write(tmp_path / "t.jsonl", *rows))


def test_missing_truncated_or_binary_files_are_data_errors(tmp_path):
    with pytest.raises(DataError, match=r"No data file at .*none\.jsonl"):
        read_jsonl(tmp_path / "none.jsonl")
    whole = gzip.compress(b'{"input": "a", "references": ["b"]}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jsonl.gz").write_bytes(b'{"input": "a", "references": ["b"]}\n')
    (tmp_path / "bytes.jsonl").write_bytes(b'{"input": "\xff"}\n')
    for name in ("cut.jsonl.gz", "text.jsonl.gz", "bytes.jsonl"):
        with pytest.raises(DataError, match=rf"{name}:\d+: cannot be read"):
            read_jsonl(tmp_path / name)


def test_the_hash_sees_every_field_and_the_order():
    one, two = Example("1", "a", ("b",)), Example("2", "a", ("b",))
    hashes = [
        data_hash(rows)
        for rows in ([one, two], [two, one], [one], [Example("1", "a", ("b",), task="t"), two])
    ]
    assert len(set(hashes)) == 4
    assert data_hash([one, two]) == hashes[0]


def test_hugging_face_columns_are_mapped_also_nested_ones(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"q": "who?", "answers": {"text": ["me", "I"]}, "title": "doc", "n": 5}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    columns = {"input": "q", "references": "answers.text", "group": "title", "id": "n"}
    (example,) = load_hf(str(tmp_path), columns=columns, task="t")
    assert example == Example("5", "who?", ("me", "I"), group="doc", task="t")
    with pytest.raises(
        DataError, match=r"no column 'answer' for 'references'\. Columns: q, answers"
    ):
        load_hf(str(tmp_path), columns={"input": "q", "references": "answer"})
    with pytest.raises(DataError, match=r"name no field of ours: output"):
        load_hf(str(tmp_path), columns={"output": "q"})
    with pytest.raises(DataError, match=r"Cannot load dataset .*, split 'other'"):
        load_hf(str(tmp_path), split="other", columns=columns)


# ------------------------------------------------------------------------------------------- tokens


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


GOOD = [1.0, 0.9, 0.7, 0.2, 0.0, 0.8, 0.9, 0.3]


def test_what_is_known_of_the_evidence_goes_into_the_batch(tmp_path, tokenizer):
    rows = [
        {"input": "a", "references": ["b"], "relevance": GOOD},
        {"input": "c", "references": ["d"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded = [encode(row, tokenizer, 64) for row in read_jsonl(path)]
    batch = collate(encoded, 0)
    assert batch["evidence"].tolist() == [pytest.approx(GOOD), [0.0] * 8]
    assert "evidence" not in collate(encoded[1:], 0)


@pytest.mark.parametrize("bad", [[1.0], [*GOOD[:-1], 1.5], [*GOOD[:-1], "x"], 0.5])
def test_relevance_that_cannot_be_is_refused_with_its_place(bad, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input": "a", "references": ["b"], "relevance": bad}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: relevance must be 8 numbers.*margin"):
        read_jsonl(path)
