"""A router from a few rows: it learns what can be learned, says how well, and is the same when loaded."""

import json

import numpy as np
import pytest
import torch

import bem
from bem.errors import ConfigError, DataError
from bem.training.data import Example, collate, encode
from bem.training.fit_router import fit_router
from bem.training.router_scores import at_turns, router_path
from bem.training.router_targets import prompts_of, turn_losses
from bem.training.routing_rows import read_routing_rows
from tests.conftest import make_llama, make_tokenizer
from tests.training.skills import CUES, NAMES, labelled, write_loras


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return write_loras(tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def by_labels(loras):
    """A fit that nobody changes."""
    return fit_router(make_llama(), make_tokenizer(), loras, labelled(20), seed=1)


def choices(mounted, rows):
    """Name of the expert of each row's last turn."""
    prompts = prompts_of(read_routing_rows(rows, NAMES), make_tokenizer(), 400)
    paths = router_path(mounted, prompts, 0, 4)
    starts = np.array([[len(path)] for path in paths])
    return [mounted.router.space.name(o) for o in at_turns(paths, starts)[:, 0]]


def test_twenty_labels_of_a_skill_are_enough_where_a_word_tells(by_labels):
    new = labelled(5, first=100)
    assert choices(by_labels.mounted, new) == [row["label"] for row in new]
    router, *plain = by_labels.scores
    assert router.accuracy.value == 1.0 and router.accuracy.high == 1.0
    assert [s.name for s in plain] == ["nearest centroid", "linear"] * 2
    assert {s.reads for s in plain} == {"layer 0", "layer 3"}
    assert all(s.regret is None for s in by_labels.scores) and by_labels.as_it_acts is None


def test_the_held_out_rows_are_a_quarter_of_each_skill_and_named(by_labels):
    counts = {name: 5 for name in NAMES}
    assert by_labels.rows["held_out"] == counts
    assert by_labels.rows["train"] == {name: 15 for name in NAMES}
    assert len(by_labels.held_out) == 15 and by_labels.held_out[0].split("-")[0] in NAMES


def test_held_out_rows_choose_nothing(loras, by_labels):
    """Other words in them, and other labels: the weights stay the same."""
    out, rows = set(by_labels.held_out), labelled(20)
    train, test = ([r for r in rows if (r["id"] in out) == side] for side in (False, True))
    for row in test:
        row |= {"prompt": row["prompt"] + " whatever", "label": "sql"}
    fits = [
        fit_router(make_llama(), make_tokenizer(), loras, train, held, seed=1)
        for held in (test, test[:3])
    ]
    weights = [fit.mounted.router.policy.state_dict() for fit in fits]
    assert all(torch.equal(weights[0][n], t) for n, t in weights[1].items())


def test_the_same_seed_gives_the_same_router_and_numbers(loras, by_labels):
    again = fit_router(make_llama(), make_tokenizer(), loras, labelled(20), seed=1)
    assert again.mounted.version == by_labels.mounted.version
    timeless = [{**fit.to_dict(), "seconds": 0} for fit in (again, by_labels)]
    assert timeless[0] == timeless[1]


def test_what_was_saved_routes_and_generates_alike_and_holds_the_numbers(by_labels, tmp_path):
    folder = by_labels.save(tmp_path / "mine")
    loaded = bem.load_router(make_llama(), folder)
    rows = labelled(3, first=50)
    assert choices(loaded, rows) == choices(by_labels.mounted, rows)
    batch = collate(prompts_of(read_routing_rows(rows, NAMES), make_tokenizer(), 400), 0)
    asked = {k: batch[k] for k in ("input_ids", "attention_mask", "turn_starts")}
    said = [
        m.model.generate(**asked, max_new_tokens=6, do_sample=False)
        for m in (loaded, by_labels.mounted)
    ]
    assert torch.equal(*said)
    record = json.loads((folder / "fit.json").read_text())
    assert record == json.loads(json.dumps(by_labels.to_dict()))
    by_labels.save(folder)  # over what we wrote ourselves


def test_a_decision_holds_for_the_whole_answer(by_labels):
    (row, *_) = labelled(1)
    ids = make_tokenizer()(f"User: {row['prompt']}\nAssistant:", return_tensors="pt")["input_ids"]
    with by_labels.mounted.router.watched() as tape:
        by_labels.mounted.model.generate(
            ids, max_new_tokens=150, do_sample=False, eos_token_id=None
        )
    taken = [by_labels.mounted.router.space.name(int(step.record[0, 0])) for step in tape]
    assert taken[0] == "base" and set(taken[1:]) == {"json"} and len(taken) > 3


@pytest.fixture(scope="module")
def answers(loras):
    """For each skill an answer that its own random LoRA finds likelier than the others do."""
    mounted = bem.mount(make_llama(), list(loras.values()))
    rows = [
        Example(word, "tell me", (word,))
        for word in ["a", "e", "i", "o", "u", "value", "return", "name", "the", "xyz"]
    ]
    encoded = [encode(row, make_tokenizer(), 400) for row in rows]
    losses = turn_losses(mounted, encoded, 0, 8, lambda done, of: None)
    margins = np.stack([of_turn[0] - of_turn[0, 1:].min() for of_turn in losses])[:, 1:]
    best = margins.argmin(0)  # of each expert the word that it comes closest to winning with
    assert (margins[best, range(3)] == 0).sum() >= 2
    return {name: rows[word].id for name, word in zip(NAMES, best, strict=True)}


def answered(n, answers):
    """Rows with answers alone."""
    return [
        {"id": row["id"], "prompt": row["prompt"], "completion": " " + answers[row["label"]]}
        for row in labelled(n)
    ]


def test_answers_are_judged_by_the_oracle_and_state_a_regret(loras, answers, tmp_path):
    rows, tokenizer = answered(20, answers), make_tokenizer()
    fit = fit_router(make_llama(), tokenizer, loras, rows, cache=tmp_path / "losses")
    router = fit.scores[0]
    assert router.regret.value >= 0 and all(s.regret_lead is not None for s in fit.scores[1:])
    # the word in the prompt tells which answer comes, and so which expert is the best
    assert router.accuracy.value > 0.8 and router.regret.value < 0.05
    assert fit.as_it_acts is not None
    assert sum(fit.rows["train"].values()) + sum(fit.rows["held_out"].values()) == 60
    stages = []
    again = fit_router(
        make_llama(), tokenizer, loras, rows, cache=tmp_path / "losses",
        on_progress=lambda stage, done, of: stages.append(stage),
    )  # fmt: skip
    assert again.scores == fit.scores
    assert "reading the answers under every expert" not in stages  # they were kept


def test_rows_of_both_kinds_and_conversations_are_learned_together(loras):
    rows = labelled(20)
    for row in rows[::2]:
        row["completion"] = " value"  # the label decides, the answer tells the price
    for i, row in enumerate(rows[1::4]):
        other = NAMES[i % 3]
        turn = [{"role": "user", "content": CUES[other]}, {"role": "assistant", "content": "value"}]
        row["messages"] = [*turn, {"role": "user", "content": row.pop("prompt")}]
        row.pop("completion", None)
        row["label"] = [other, row["label"]]
    fit = fit_router(make_llama(), make_tokenizer(), loras, rows)
    assert fit.scores[0].accuracy.value > 0.7  # of three
    assert fit.scores[0].regret is not None
    talk = [
        {"role": "user", "content": CUES["sql"]},
        {"role": "assistant", "content": "value"},
        {"role": "user", "content": CUES["chat"]},
    ]
    assert choices(fit.mounted, [{"messages": talk, "label": "chat"}]) == ["chat"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([r for r in labelled(20) if r["label"] != "sql"], "no row is labelled 'sql'"),
        (
            [r for r in labelled(20) if r["label"] != "sql" or int(r["id"][4:]) < 5],
            "'sql' is right for [0-9] rows, fewer than 8",
        ),
        (
            [*labelled(9), {"prompt": "x", "label": "sqll"}],
            "example 28: label 'sqll' names no expert",
        ),
        ([*labelled(9), {"prompt": "x"}], "example 28: the row has neither"),
    ],
)
def test_rows_that_teach_nothing_are_refused_and_the_model_is_left_bare(loras, rows, message):
    model = make_llama()
    with pytest.raises(DataError, match=message):
        fit_router(model, make_tokenizer(), loras, rows)
    assert not any("bem" in name for name, _ in model.named_modules())


def test_options_that_cannot_be_honoured_are_refused(loras):
    for held_out in (0.0, 1.0, 1, -0.5):
        with pytest.raises(ConfigError, match="held_out must be a share"):
            fit_router(make_llama(), make_tokenizer(), loras, labelled(20), held_out)
    with pytest.raises(ConfigError, match="strengths: a router that is fitted to few rows"):
        fit_router(make_llama(), make_tokenizer(), loras, labelled(20), strengths=(0.5, 1.0))
    with pytest.raises(ConfigError, match="chunk_sise"):
        fit_router(make_llama(), make_tokenizer(), loras, labelled(20), chunk_sise=8)


def test_the_bare_base_can_be_a_label(loras):
    rows = labelled(20)
    for row in rows:
        if row["label"] == "chat":
            row["label"] = "base"
    two = {name: loras[name] for name in ("json", "sql")}
    fit = fit_router(make_llama(), make_tokenizer(), two, rows)
    assert fit.rows["train"] == {"base": 15, "json": 15, "sql": 15}
    prompts = prompts_of(read_routing_rows(rows[:3], NAMES), make_tokenizer(), 400)
    last = [p[-1] for p in router_path(fit.mounted, prompts, 0, 4)]
    assert last == [1, 2, 0]


def test_rows_that_were_learned_cannot_be_judged_on(loras):
    rows = labelled(9)
    test = [*labelled(3, first=50), {**rows[4], "id": "again"}]
    with pytest.raises(DataError, match=r"1 of the 10 held-out rows.*row 'again' is there as"):
        fit_router(make_llama(), make_tokenizer(), loras, rows, test)


def test_a_share_that_leaves_nothing_to_learn_from_is_refused(loras):
    with pytest.raises(
        DataError, match=r"1 of the 3 rows that are left.*at least 2.*Hold out less"
    ):
        fit_router(make_llama(), make_tokenizer(), loras, labelled(9), 0.99)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": None}, "held_out must be a share between 0 and 1, or rows; got None"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1; got 0"),
        ({"seed": -1}, "seed must be a whole number from 0; got -1"),
        ({"max_length": 10.5}, "max_length must be a whole number from 1; got 10.5"),
    ],
)
def test_impossible_arguments_are_named(loras, options, message):
    with pytest.raises(ConfigError, match=message):
        fit_router(make_llama(), make_tokenizer(), loras, labelled(9), **options)


def test_prompts_whose_beginning_was_cut_off_are_counted(loras, by_labels):
    rows = labelled(9)
    rows[0]["prompt"] = "once more " * 60 + rows[0]["prompt"]
    fit = fit_router(make_llama(), make_tokenizer(), loras, rows, max_length=100)
    assert fit.notes[0].startswith("1 of 27 prompts fill max_length (100 tokens)")
    assert not any("max_length" in note for note in by_labels.notes)
