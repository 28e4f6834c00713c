"""Evidence in a task's rows: what is found, withheld, made worse, kept and left out."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bem.config import EVIDENCE_FEATURES, ExperimentConfig, RetrievalConfig, TaskConfig
from bem.errors import DataError
from bem.experiments.run import run
from bem.runs.folder import RunFolder, read_jsonl
from bem.stats.files import load
from bem.tasks.load import load_task
from bem.tasks.record import Task
from bem.tasks.retrieval import corpus_of, with_evidence
from bem.training.data import Example

ANIMALS = [
    "heron",
    "otter",
    "badger",
    "falcon",
    "lynx",
    "marten",
    "plover",
    "curlew",
    "siskin",
    "dunlin",
    "avocet",
    "bittern",
]
PLACES = [
    "marsh",
    "river",
    "forest",
    "cliff",
    "mountain",
    "barn",
    "beach",
    "moor",
    "alder",
    "mudflat",
    "lagoon",
    "reeds",
]


def rows(part, animals=ANIMALS):
    return [
        Example(
            f"{part}-{i}",
            f"Where does the {animal} of {part} sleep?",
            (place,),
            evidence=(
                f"The {animal} of {part} sleeps near the {place}. It wakes at {5 + i} o'clock.",
            ),
            gold_evidence=(0,),
        )
        for i, (animal, place) in enumerate(zip(animals, PLACES, strict=False))
    ]


def task(retrieval=None, train=None, dev=None, **changes):
    train, dev = train or rows("north"), dev or rows("south")
    values = dict(
        name="sleep", train=train, dev=dev, metrics=("em", "loss"), primary="em", max_new_tokens=3,
        retrieval=retrieval or RetrievalConfig(candidates=6, shown=2),
        corpus=corpus_of([*train, *dev], []),
    )  # fmt: skip
    return Task(**{**values, **changes})


@pytest.fixture(scope="module")
def found():
    return with_evidence(task(), None)


def test_the_passage_that_was_asked_for_stands_last_beside_the_question(found):
    for row, before in zip(found.dev, rows("south"), strict=True):
        assert len(row.evidence) == 2
        assert row.evidence[-1] == before.evidence[0] and row.gold_evidence == (1,)
        assert row.prompt.endswith(before.evidence[0] + "\n" + before.input)


def test_relevance_is_known_and_its_margin_is_best_minus_median(found):
    for row in (*found.train, *found.dev):
        known = dict(zip(EVIDENCE_FEATURES, row.relevance, strict=True))
        assert known["present"] == 1 and 0 < known["margin"] <= known["best"] <= 1


def test_worse_indices_keep_the_questions_and_lose_the_answers(found):
    for condition, rows_ in found.variants.items():
        assert [(r.id, r.input, r.references) for r in rows_] == [
            (r.id, r.input, r.references) for r in found.dev
        ]
        held = [any(r.references[0] in text for text in r.evidence) for r in rows_]
        assert np.mean(held) < 1, condition
    gold = [bool(r.gold_evidence) for r in found.variants["shuffled"]]
    assert np.mean(gold) < 0.5  # 24 passages: some questions meet their own by chance
    assert not any(r.evidence or r.relevance for r in found.variants["off"])
    margin = lambda part: np.mean([r.relevance[2] for r in part])  # noqa: E731
    assert margin(found.dev) > margin(found.variants["shuffled"])


def test_withheld_rows_never_see_their_gold_passage():
    found = with_evidence(task(RetrievalConfig(candidates=6, shown=2, withheld=0.5)), None)
    assert sum(not r.gold_evidence for r in found.train) == 6 == found.facts["withheld"]
    assert all(r.gold_evidence for r in found.dev)


def test_ranks_of_the_gold_passage_by_search_and_by_reranker(found):
    assert found.facts["ranks"]["search"] == [1] * 12  # the only passage with all words
    assert len(found.facts["ranks"]["reranked"]) == 12
    assert found.facts["passages"] == 24


def test_a_held_out_row_whose_passage_was_trained_on_is_left_out():
    leaking = rows("south")
    leaking[3] = replace(leaking[3], evidence=rows("north")[3].evidence)
    found = with_evidence(task(dev=leaking), None)
    assert found.facts["leaked"] == 1 and found.facts["held_out"] == 12
    assert [r.id for r in found.dev] == [f"south-{i}" for i in range(12) if i != 3]
    with pytest.raises(DataError, match="Every held-out row"):
        with_evidence(task(dev=rows("north")), None)


def test_without_a_reranker_the_order_is_the_search_s_and_nothing_is_known():
    found = with_evidence(task(RetrievalConfig(candidates=6, shown=2, reranker="none")), None)
    assert not any(r.relevance for r in found.dev)
    assert all(r.gold_evidence == (1,) for r in found.dev)


def test_passages_of_the_row_alone_are_ranked_and_may_keep_their_order():
    def story(part):
        texts = [r.evidence[0] for r in rows(part)]
        return [
            replace(r, evidence=tuple(texts), gold_evidence=(i,)) for i, r in enumerate(rows(part))
        ]

    config = RetrievalConfig(source="row", candidates=12, shown=4, keep_order=True)
    found = with_evidence(task(config, story("north"), story("south"), corpus=[]), None)
    texts = story("south")[0].evidence
    for row in found.dev:
        places = [texts.index(text) for text in row.evidence]
        assert places == sorted(places) and len(places) == 4
    assert np.mean([bool(r.gold_evidence) for r in found.dev]) == 1
    assert found.facts["ranks"] is None


def test_what_was_found_is_kept_and_read_again_and_damage_is_repaired(tmp_path, monkeypatch):
    first = with_evidence(task(), tmp_path)
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr("bem.tasks.retrieval.EvidenceFinder", None)  # nothing is searched again
    again = with_evidence(task(), tmp_path)
    assert again == first
    monkeypatch.undo()
    kept.write_bytes(b"broken")
    assert with_evidence(task(), tmp_path) == first


def test_other_settings_are_kept_apart(tmp_path):
    with_evidence(task(), tmp_path)
    with_evidence(task(RetrievalConfig(candidates=6, shown=1)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_same_seed_same_evidence(found):
    assert with_evidence(task(), None) == found


def test_a_corpus_names_each_text_once():
    passages = corpus_of([*rows("north"), *rows("north")], [])
    assert len(passages) == 12 and passages[0].id == "north-0:0"


def test_a_task_that_retrieves_needs_passages(tmp_path):
    files = {part: tmp_path / f"{part}.jsonl" for part in ("train", "dev")}
    for part, path in files.items():
        path.write_text(json.dumps({"input": part, "references": ["y"]}) + "\n")
    paths = {part: str(path) for part, path in files.items()}
    entry = TaskConfig(name="mine", retrieval=RetrievalConfig(), **paths)
    with pytest.raises(DataError, match="nothing to search"):
        load_task(entry)


def test_further_passages_come_from_files(tmp_path):
    path, more = tmp_path / "rows.jsonl", tmp_path / "more.jsonl"
    path.write_text(json.dumps({"input": "heron", "references": ["marsh"]}) + "\n")
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"input": "otter", "references": ["river"]}) + "\n")
    more.write_text(json.dumps({"id": "p", "text": "The heron sleeps in the marsh."}) + "\n")
    retrieval = RetrievalConfig(corpora=[str(more)], swap=False)
    loaded = load_task(
        TaskConfig(name="mine", train=str(train), dev=str(path), retrieval=retrieval)
    )
    found = with_evidence(loaded, None)
    assert found.dev[0].evidence == ("The heron sleeps in the marsh.",) and not found.variants


def test_a_run_measures_the_swap_judges_it_and_reports_it(tmp_path, micro_base):
    for part in ("north", "south"):
        lines = [
            {
                "id": r.id, "input": r.input, "references": r.references,
                "evidence": r.evidence, "gold_evidence": r.gold_evidence,
            }
            for r in rows(part)
        ]  # fmt: skip
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    config = ExperimentConfig.model_validate(
        {
            "name": "small", "output": str(tmp_path / "runs"), "base": str(micro_base),
            "seeds": [0, 1],
            "data": {
                "tasks": [{
                    "name": "sleep", "train": str(tmp_path / "north.jsonl"),
                    "dev": str(tmp_path / "south.jsonl"), "max_new_tokens": 3,
                    "retrieval": {"candidates": 6, "shown": 2},
                }],
            },
            "adapters": {"rank": 4},
            "arms": [
                {"name": "s0", "role": "baseline"},
                {"name": "v2", "adapters": {"variant": "v2"}, "match": "none"},
            ],
            "training": {"steps": 3, "batch_size": 4, "max_length": 256},
            "gates": {"n_bootstrap": 200}, "latency_rounds": 2,
        }
    )  # fmt: skip
    result = run(config)
    folder = RunFolder(result.folder)
    measured = load(folder.cell("v2", 0).measurement)
    assert {k: np.shape(v) for k, v in measured.router.index_swap.items()} == {
        c: (1, 12) for c in ("clean", "corrupt", "shuffled", "off")
    }
    names = {check.name for check in result.verdicts["v2"].checks}
    assert {"index_swap.clean>=corrupt", "index_swap.corrupt>=shuffled"} <= names
    (answer, *_) = read_jsonl(folder.cell("v2", 0).predictions)
    assert len(answer["relevance"]) == len(EVIDENCE_FEATURES) and 0 < answer["gate"] < 2
    assert "gate" not in read_jsonl(folder.cell("s0", 0).predictions)[0]
    text = (result.folder / "report.md").read_text()
    assert "## Evidence" in text and "correlation of gate and margin" in text
    html = result.report.read_text()
    assert all(f'aria-label="{t}' in html for t in ("quality (points) with an index", "Share of"))


def test_a_row_with_its_own_passages_leaks_only_as_a_whole():
    both = ("The heron sleeps near the marsh after a long flight.", "The otter left the river.")
    train = [replace(r, evidence=both, gold_evidence=(0,)) for r in rows("north")[:2]]
    same = replace(rows("south")[0], evidence=both, gold_evidence=(0,))
    other = ("Nobody has seen the badger since the storm came.", *both[:1])
    shares_a_sentence = replace(rows("south")[1], evidence=other, gold_evidence=(1,))
    config = RetrievalConfig(source="row", candidates=2, shown=1, reranker="none", swap=False)
    found = with_evidence(task(config, train, [same, shares_a_sentence], corpus=[]), None)
    assert [r.id for r in found.dev] == ["south-1"] and found.facts["leaked"] == 1


def test_rows_that_do_not_name_their_gold_passage_have_no_ranks_and_still_no_leaks():
    plain = lambda part: [replace(r, gold_evidence=()) for r in rows(part)]  # noqa: E731
    config = RetrievalConfig(candidates=6, shown=2, reranker="none", swap=False)
    found = with_evidence(task(config, plain("north"), plain("south")), None)
    assert found.facts["ranks"] is None and found.facts["leaked"] == 0
    with pytest.raises(DataError, match="Every held-out row"):
        with_evidence(task(config, plain("north"), plain("north")), None)
    withheld = config.model_copy(update={"withheld": 0.5})
    with pytest.raises(DataError, match="gold_evidence"):
        with_evidence(task(withheld, plain("north"), plain("south")), None)


def test_without_any_evidence_question_and_answer_must_differ(tmp_path):
    bare = [replace(r, evidence=(), gold_evidence=()) for r in rows("north")]
    config = RetrievalConfig(candidates=6, shown=2, reranker="none", swap=False)
    corpus = corpus_of(rows("north"), [])
    with pytest.raises(DataError, match="Every held-out row"):
        with_evidence(task(config, bare, bare, corpus=corpus), None)


def test_gold_is_known_with_and_without_its_title():
    titled = [replace(p, title="Animals") for p in corpus_of([*rows("north"), *rows("south")], [])]
    shown = [replace(r, evidence=(f"Animals: {r.evidence[0]}",)) for r in rows("south")]
    config = RetrievalConfig(candidates=6, shown=2, reranker="none", swap=False)
    for dev in (rows("south"), shown):
        found = with_evidence(task(config, dev=dev, corpus=titled), None)
        assert all(r.gold_evidence == (1,) for r in found.dev)


def test_rows_set_aside_find_their_evidence_as_training_rows_do():
    train = rows("train")
    config = RetrievalConfig(reranker="none", swap=False)
    shared = dict(metrics=("em",), primary="em", max_new_tokens=8, retrieval=config)
    corpus = corpus_of(train, [])
    whole = with_evidence(Task("t", train, rows("dev")[:2], corpus=corpus, **shared), None)
    apart = Task("t", train[:9], rows("dev")[:2], validation=train[9:], corpus=corpus, **shared)
    found = with_evidence(apart, None)
    assert (found.train, found.validation) == (whole.train[:9], whole.train[9:])
    assert all(row.evidence for row in found.validation)
