"""Rows are read as they are meant, whole, or refused with file and line."""

import gzip
import hashlib
import json

import pytest

from bem.errors import DataError
from bem.training.example import Example, data_hash
from bem.training.rows import load_hf, read_jsonl

ROW = {"input": "q", "references": ["a"]}
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "u0"},
    {"role": "assistant", "content": "a0"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a1"},
]


def write(path, *rows, encoding="utf-8"):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) + "\n" for r in rows]
    path.write_text("".join(lines), encoding=encoding)
    return path


def read(tmp_path, *rows, columns=None, encoding="utf-8"):
    return read_jsonl(write(tmp_path / "t.jsonl", *rows, encoding=encoding), columns=columns)


# --- files --------------------------------------------------------------------------------------


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


def test_gzip_and_plain_hold_the_same_rows_whatever_the_suffix_says(tmp_path):
    line = json.dumps({"id": "1", "input": "ä", "references": ["ö"]})
    plain = write(tmp_path / "a.jsonl", line + "\n\n")
    packed = tmp_path / "a.jsonl.gz"
    with gzip.open(packed, "wt", encoding="utf-8") as file:
        file.write(line)
    named_wrongly = write(tmp_path / "b.jsonl.gz", line)
    hashes = {data_hash(read_jsonl(path)) for path in (plain, packed, named_wrongly)}
    assert len(hashes) == 1


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_row(tmp_path, character):
    raw = json.dumps(f"a{character}b", ensure_ascii=character < " ")
    line = f'{{"input": {raw}, "references": [{raw}], "group": {raw}}}'
    for ending in ("\n", "\r\n", "\r"):
        path = tmp_path / "t.jsonl"
        path.write_bytes(f"{line}{ending}{line}{ending}".encode())
        first, second = read_jsonl(path)
        assert first.input == second.group == f"a{character}b"


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (row,) = read(tmp_path, ROW, encoding="utf-8-sig")
    assert row.input == "q"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        (["\n \n"], "holds no rows"),
        ([ROW, "{oops\n"], r"t\.jsonl:2: not JSON: .* column 2"),
        ([ROW, "[" * 100_000], r"t\.jsonl:2: not JSON"),
        ([f'{{"input": {"1" * 5000}}}'], r"t\.jsonl:1: not JSON"),
        (["[1]\n"], r"t\.jsonl:1: a row must be a JSON object, found list"),
        ([{"input": "a"}], r"t\.jsonl:1: missing references \(the row has input\)"),
        ([{"references": ["b"]}], r"t\.jsonl:1: missing input"),
        (["{}"], r"t\.jsonl:1: missing input and references \(the row has no fields\)"),
        ([{"text": "a"}], r"the row has text\).*messages, or prompt and completion; `columns`"),
        ([{**ROW, "references": None}], r"t\.jsonl:1: missing references"),
        ([{**ROW, "references": [3]}], r"t\.jsonl:1: references must be a list of texts"),
        ([{**ROW, "references": 3}], r"t\.jsonl:1: references must be a list of texts, found 3"),
        ([{**ROW, "references": [None]}], r"t\.jsonl:1: references must be a list of texts"),
        ([{**ROW, "references": [["b"]]}], r"t\.jsonl:1: references must be a list of texts"),
        ([{**ROW, "references": {"text": ["b"]}}], r"t\.jsonl:1: references must be a list"),
        ([{**ROW, "input": 3}], r"t\.jsonl:1: input must be text, found int"),
        ([{**ROW, "input": ["a"]}], r"t\.jsonl:1: input must be text, found list"),
        ([{**ROW, "evidence": 7}], r"t\.jsonl:1: evidence must be a list of texts, found 7"),
        ([{**ROW, "evidence": 0}], r"t\.jsonl:1: evidence must be a list of texts, found 0"),
        ([{**ROW, "evidence": [None]}], r"t\.jsonl:1: evidence must be a list of texts"),
        ([{**ROW, "evidence": {"a": 1}}], r"t\.jsonl:1: evidence must be a list of texts"),
        ([{**ROW, "instruction": 5}], r"t\.jsonl:1: instruction must be text, found int 5"),
        ([{**ROW, "instruction": 0}], r"t\.jsonl:1: instruction must be text, found int 0"),
        ([{**ROW, "system": ["x"]}], r"t\.jsonl:1: system must be text, found list"),
        ([{**ROW, "meta": 0}], r"t\.jsonl:1: meta must be an object, found int"),
        ([{**ROW, "meta": []}], r"t\.jsonl:1: meta must be an object, found list"),
        ([{**ROW, "task": {"a": 1}}], r"t\.jsonl:1: task must be text or a number"),
        ([{**ROW, "group": True}], r"t\.jsonl:1: group must be text or a number, found True"),
        ([{**ROW, "group": ["d"]}], r"t\.jsonl:1: group must be text or a number"),
        (['{"input": "a", "references": [], "group": NaN}'], r"t\.jsonl:1: group .* found nan"),
        ([{**ROW, "id": False}], r"t\.jsonl:1: id must be text or a number, found False"),
        ([{**ROW, "id": ""}], r"t\.jsonl:1: id is empty"),
        ([{**ROW, "id": 7}] * 2, r":2: id '7' was used before, in .*:1"),
        ([{**ROW, "id": 7}, {**ROW, "id": "7"}], r":2: id '7' was used before, in .*:1"),
        ([ROW, {**ROW, "id": "t-1"}], r":2: id 't-1' was used before, in .*:1"),
        (['{"input": "\\ud800", "references": []}'], r"t\.jsonl:1: input holds half a character"),
        (['{"input": "", "references": ["\\udc00"]}'], r":1: references holds half a character"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_file_and_line(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, *rows)


@pytest.mark.parametrize(
    "gold",
    [0, 1, "0", [False, True, False], [3], [-1], [1.0], ["1"], [None], [[1]], {"0": 1}, True],
)
def test_gold_evidence_is_a_list_of_places_and_nothing_else(tmp_path, gold):
    with pytest.raises(DataError, match=r"t\.jsonl:1: gold_evidence .* must be a list of indices"):
        read(tmp_path, {**ROW, "evidence": ["p", "q", "r"], "gold_evidence": gold})


@pytest.mark.parametrize(
    "history",
    ["hi", 0, True, {"role": "user"}, ["hi", "yo"], [["u"]], [["u", "v", "w"]], [["u", None]],
     [["u", 3]], [None], [["u", "v"], {"role": "user", "content": "x"}], CHAT[:2], CHAT[1:4],
     CHAT[2:], [*CHAT[1:3], CHAT[0]], [{"role": "user"}], [{"role": "tool", "content": "x"}],
     [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}],
     [{"role": "user", "content": ["x"]}, {"role": "assistant", "content": "x"}]],
)  # fmt: skip
def test_a_history_that_is_not_answered_turns_is_refused(tmp_path, history):
    with pytest.raises(DataError, match=r"t\.jsonl:1: history"):
        read(tmp_path, {**ROW, "history": history})


@pytest.mark.parametrize("bad", [[1.0], [*[0.5] * 7, 1.5], [*[0.5] * 7, "x"], 0.5, 0, [True] * 8])
def test_relevance_that_cannot_be_is_refused_with_its_place(tmp_path, bad):
    with pytest.raises(DataError, match=r"t\.jsonl:1: relevance must be 8 numbers.*margin"):
        read(tmp_path, {**ROW, "relevance": bad})


def test_missing_truncated_or_binary_files_are_data_errors(tmp_path):
    with pytest.raises(DataError, match=r"No data file at .*none\.jsonl"):
        read_jsonl(tmp_path / "none.jsonl")
    whole = gzip.compress(b'{"input": "a", "references": ["b"]}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "changed.jsonl.gz").write_bytes(whole[:30] + b"\xff" * 20 + whole[50:])
    (tmp_path / "bytes.jsonl").write_bytes(b'{"input": "\xff"}\n')
    for name in ("cut.jsonl.gz", "changed.jsonl.gz", "bytes.jsonl"):
        with pytest.raises(DataError, match=rf"{name}:\d+: (cannot be read|is not UTF-8)"):
            read_jsonl(tmp_path / name)


# --- what a field means ---------------------------------------------------------------------------


def test_document_0_is_one_document_like_any_other(tmp_path):
    groups = [0, 0, 1, "0", 1.5, None, ""]
    rows = read(tmp_path, *({**ROW, "id": str(i), "group": g} for i, g in enumerate(groups)))
    assert [row.group for row in rows] == ["0", "0", "1", "0", "1.5", "5", "6"]


def test_null_is_the_same_as_a_field_that_is_not_there(tmp_path):
    nothing = dict.fromkeys(
        ("id", "evidence", "gold_evidence", "group", "task", "instruction", "history", "relevance",
         "meta", "system")
    )  # fmt: skip
    assert read(tmp_path, {**ROW, **nothing}) == read(tmp_path, ROW)


def test_one_text_stands_for_a_list_of_one(tmp_path):
    (row,) = read(tmp_path, {"input": "q", "references": "a", "evidence": "p"})
    assert (row.references, row.evidence) == (("a",), ("p",))


def test_a_history_of_messages_is_its_answered_turns(tmp_path):
    (row,) = read(tmp_path, {**ROW, "history": CHAT[1:3]})
    assert row.history == (("u0", "a0"),) and row.system == ""
    (row,) = read(tmp_path, {**ROW, "history": CHAT})
    assert row.history == (("u0", "a0"), ("u1", "a1")) and row.system == "be brief"
    with pytest.raises(DataError, match="a system field and a system message: keep one"):
        read(tmp_path, {**ROW, "history": CHAT, "system": "x"})


def test_no_reference_means_that_the_right_answer_is_empty(tmp_path):
    (row,) = read(tmp_path, {"input": "unanswerable?", "references": []})
    assert row.references == () and row.answer == ""


def test_an_example_made_by_hand_is_checked_like_one_from_a_file():
    with pytest.raises(DataError, match="references must be a list of texts, found 'yes'"):
        Example("1", "q", "yes")  # pyright: ignore
    with pytest.raises(DataError, match="id must be text, found int 1"):
        Example(1, "q", ("a",))  # pyright: ignore
    assert Example("1", "q", ["a"]).references == ("a",)  # pyright: ignore


# --- TRL's forms ----------------------------------------------------------------------------------

READ = Example(
    "t-1", "u1", ("a1",), history=(("u0", "a0"),), system="be brief", group="doc", meta={"k": 1}
)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"prompt": CHAT[:4], "completion": CHAT[4:]},
        {"prompt": CHAT[:4], "completion": "a1"},
        {"messages": CHAT, "prompt": "u1"},  # UltraChat names its first question again
    ],
)
def test_messages_and_prompt_with_completion_are_read_as_one_conversation(tmp_path, row):
    assert read(tmp_path, {**row, "group": "doc", "meta": {"k": 1}}) == [READ]


def test_a_completion_of_text_loses_only_the_space_that_parts_it_from_its_prompt(tmp_path):
    completions = [" blue", "blue", "    return 1", "\nblue", "", " "]
    rows = read(tmp_path, *({"prompt": "The sky is", "completion": c} for c in completions))
    assert {row.input for row in rows} == {"The sky is"}
    assert [row.answer for row in rows] == ["blue", "blue", "    return 1", "\nblue", "", ""]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages must be a list of messages"),
        ({"messages": "u0"}, "messages must be a list of messages"),
        ({"messages": CHAT[:1]}, "messages must end with an assistant message"),
        ({"messages": CHAT[:4]}, "messages must end with an assistant message"),
        ({"messages": [CHAT[1], CHAT[3]]}, "message 2 has role 'user' where 'assistant' belongs"),
        ({"messages": [CHAT[0], *CHAT]}, "message 2 has role 'system' where 'user' belongs"),
        ({"messages": [CHAT[1], {**CHAT[2], "tool_calls": [1]}]}, "tool calls .* are not read"),
        ({"messages": [{"from": "human", "value": "x"}]}, "role and content must be text"),
        ({"messages": CHAT, "history": [["u", "v"]]}, "put the earlier turns into messages"),
        ({"prompt": 3, "completion": "x"}, "prompt must be text or messages, found int"),
        ({"prompt": "x", "completion": None}, r"missing input and references \(the row has prompt"),
        ({"prompt": "x", "completion": 3}, "completion must be text or a list of one assistant"),
        ({"prompt": "x", "completion": CHAT[1:3]}, "a list of one assistant message"),
        ({"prompt": "x", "completion": CHAT[1:2]}, "has role 'user' where 'assistant' belongs"),
        ({"prompt": CHAT[:3], "completion": "x"}, "has role 'assistant' where 'user' belongs"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "missing input and references"),
        ({"prompt": "\ud800", "completion": "y"}, "input holds half a character"),
    ],
)
def test_conversations_that_cannot_be_used_are_refused_with_file_and_line(tmp_path, row, message):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=rf"t\.jsonl:1: .*{message}"):
        read_jsonl(path)


# --- columns --------------------------------------------------------------------------------------


def test_columns_of_a_file_are_mapped_also_nested_ones(tmp_path):
    row = {
        "q": 5,
        "answers": {"text": ["me", 7]},
        "title": 0,
        "a.b": "dotted",
        "references": ["no"],
    }
    columns = {"input": "q", "references": "answers.text", "group": "title", "instruction": "a.b"}
    (example,) = read(tmp_path, row, columns=columns)
    assert example == Example("t-1", "5", ("me", "7"), group="0", instruction="dotted")


def test_a_column_that_is_not_there_is_named_with_its_line(tmp_path):
    rows = [{"q": "x", "a": {"b": "y"}}, {"q": "x", "a": None}]
    with pytest.raises(DataError, match=r":2: no column 'a\.b' for 'references'\. Columns: q, a"):
        read(tmp_path, *rows, columns={"input": "q", "references": "a.b"})
    with pytest.raises(DataError, match=r"name no field of ours: output\..*Fields: id, input"):
        read(tmp_path, ROW, columns={"output": "q"})
    with pytest.raises(DataError, match=r"Did you mean 'references'"):
        read(tmp_path, ROW, columns={"reference": "q"})


def test_an_empty_cell_is_no_answer_nan(tmp_path):
    with pytest.raises(DataError, match=r"t\.jsonl:1: references is nan: a table's empty cell"):
        read(tmp_path, '{"q": "x", "a": NaN}', columns={"input": "q", "references": "a"})


def test_columns_choose_the_form_of_the_row(tmp_path):
    row = {"chat": CHAT, "group": "doc", "meta": {"k": 1}, **ROW}
    assert read(tmp_path, row, columns={"messages": "chat"}) == [READ]
    both = {"prompt": "p", "completion": " c", "messages": CHAT}
    (example,) = read(tmp_path, both, columns={"prompt": "prompt"})
    assert (example.input, example.answer) == ("p", "c")
    with pytest.raises(DataError, match="mix two forms of a row"):
        read(tmp_path, both, columns={"messages": "messages", "input": "prompt"})


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


def test_a_dataset_of_messages_needs_no_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"messages": CHAT}]).to_parquet(str(tmp_path / "train.parquet"))
    (example,) = load_hf(str(tmp_path))
    assert (example.input, example.answer, example.system) == ("u1", "a1", "be brief")


# --- the hash -------------------------------------------------------------------------------------


def test_the_hash_sees_every_field_and_the_order():
    one, two = Example("1", "a", ("b",)), Example("2", "a", ("b",))
    lists = [[one, two], [two, one], [one], [Example("1", "a", ("b",), task="t"), two],
             [Example("1", "a", ("b",), system="s"), two]]  # fmt: skip
    hashes = [data_hash(rows) for rows in lists]
    assert len(set(hashes)) == 5
    assert data_hash([one, two]) == hashes[0]


def test_the_hash_of_rows_without_a_system_message_is_the_one_it_always_was():
    row = (
        '{"evidence":[],"gold_evidence":[],"group":"1","history":[],"id":"1","input":"a",'
        '"instruction":"","meta":{},"references":["b"],"relevance":[],"task":""}\n'
    )
    assert data_hash([Example("1", "a", ("b",))]) == hashlib.sha256(row.encode()).hexdigest()
    with pytest.raises(DataError, match=r"Row '1': meta cannot be written as JSON"):
        data_hash([Example("1", "a", ("b",), meta={"at": object()})])


def test_a_document_is_the_same_whether_its_number_is_written_whole_or_not(tmp_path):
    rows = [{**ROW, "group": group} for group in (7, 7.0, "7", 7.5, 10**400)]
    groups = [e.group for e in read_jsonl(write(tmp_path / "t.jsonl", *rows))]
    assert groups == ["7", "7", "7", "7.5", str(10**400)]
