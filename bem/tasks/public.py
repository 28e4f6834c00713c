"""The public sets: files NAME.train.jsonl.gz and NAME.dev.jsonl.gz in one folder (`data.root`).

Sources and licences stand in the README beside the files. The cluster of each row (its `group`) is
the thing that several rows were made from: a story, an article, a table, a dialogue, a command, a
scene; rows that stand alone are their own cluster.

    snips_forms    the same utterance -> JSON, its intent, or its slots; the cue one chunk earlier
    rnnlg_styles   a dialogue act without its domain -> a sentence; the domain one chunk earlier
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bem.config import RetrievalConfig
from bem.errors import DataError
from bem.tasks.derived import (
    first_acceptable,
    rnnlg_styles,
    scene_in_words,
    snips_forms,
    with_gold,
)
from bem.tasks.record import ANSWER_METRICS, STRUCTURE_METRICS, TEXT_METRICS, Family
from bem.training.data import Example, read_jsonl


@dataclass(frozen=True)
class PublicSet:
    """A file pair and how its rows are understood."""

    family: Family
    group: Callable[[Example], str] = lambda row: row.id
    parts: tuple[str, ...] = ("train", "dev")
    source: str = ""
    """Name of the file, if it is not the task's own."""
    derive: Callable[[list[Example]], Iterator[Example]] = iter
    """Makes the task's rows from the file's."""


def _meta(key: str) -> Callable[[Example], str]:
    return lambda row: str(row.meta[key])


def _without_last_number(row: Example) -> str:
    """`dev-1_00048-7` -> `dev-1_00048`: the dialogue, story or scene."""
    return row.id.rsplit("-", 1)[0]


def _passage(row: Example) -> str:
    return hashlib.md5(" ".join(row.evidence).encode()).hexdigest()[:12]


def _answer(instruction: str, **changes) -> Family:
    values = dict(form="text", metrics=ANSWER_METRICS, primary="em", max_new_tokens=24)
    return Family(**{"about": "", "instruction": instruction, **values, **changes})


def _text(instruction: str, **changes) -> Family:
    values = dict(form="text", metrics=TEXT_METRICS, primary="chrf", max_new_tokens=80)
    return Family(**{"about": "", "instruction": instruction, **values, **changes})


def _json(instruction: str, **changes) -> Family:
    values = dict(form="json", metrics=STRUCTURE_METRICS, primary="em", max_new_tokens=96)
    return Family(**{"about": "", "instruction": instruction, **values, **changes})


def _label(instruction: str, **changes) -> Family:
    return _answer(instruction, **{"form": "label", "max_new_tokens": 16, **changes})


FROM_EVIDENCE = "Answer from the text."
_SEARCHED = RetrievalConfig(candidates=20, shown=2, withheld=0.2)
PUBLIC: dict[str, PublicSet] = {
    "qa_babi": PublicSet(
        _answer(FROM_EVIDENCE, about="stories, marked facts", max_new_tokens=8, slice_by=("hops",)),
        _without_last_number,
    ),
    "qa_nq_oracle": PublicSet(_answer(FROM_EVIDENCE, about="real queries"), _meta("title")),
    "qa_hotpot500": PublicSet(
        _answer(FROM_EVIDENCE, about="two-hop questions among distractors"), parts=("dev",)
    ),
    "qa_xquad_en": PublicSet(
        _answer(FROM_EVIDENCE, about="answers are spans of a paragraph"), _passage, ("dev",)
    ),
    "qa_pubmed": PublicSet(_label("Answer yes, no or maybe.", about="abstracts", max_new_tokens=4)),
    "qa_strategy": PublicSet(
        _label("Answer yes or no.", about="several steps", max_new_tokens=4), _meta("term")
    ),
    "math_gsm8k": PublicSet(
        _answer(
            "Give the final number.",
            about="word problems",
            form="number",
            metrics=("em", "loss"),
            max_new_tokens=8,
        )
    ),
    "gen_e2e": PublicSet(_text("Describe the restaurant.", about="slots to text")),
    "gen_rnnlg": PublicSet(
        _text("Say it in a sentence.", about="dialogue act to text", slice_by=("domain",)),
        lambda row: row.input,
    ),
    "gen_sgd": PublicSet(
        _text("Say it to the user.", about="dialogue acts to text", max_new_tokens=48),
        _without_last_number,
    ),
    "gen_xquad_translate": PublicSet(
        _text("Translate into German.", about="questions en-de", max_new_tokens=48), parts=("dev",)
    ),
    "json_snips": PublicSet(_json("Intent and slots as JSON.", about="utterance to JSON")),
    "json_restaurant8k": PublicSet(
        _json("Booking slots as JSON.", about="utterance to slots", max_new_tokens=48)
    ),
    "json_sgd_call": PublicSet(
        _json("The API call as JSON.", about="dialogue to call", max_new_tokens=128),
        _without_last_number,
    ),
    "tool_bfcl": PublicSet(
        _json('The call as JSON, or "none".', about="tool use", form="tool", max_new_tokens=128),
        parts=("dev",),
        derive=first_acceptable,
    ),
    "sql_wikisql": PublicSet(
        _answer(
            "Write the SQL.",
            about="question and columns to SQL",
            form="sql",
            metrics=STRUCTURE_METRICS,
            max_new_tokens=64,
        ),
        _meta("table"),
    ),
    "cmd_tldr": PublicSet(
        _answer(
            "Write the command.",
            about="task to shell command",
            form="shell",
            metrics=("chrf", "em", "f1", "validity", "loss"),
            primary="chrf",
            max_new_tokens=48,
        ),
        _meta("command"),
    ),
    "intent_clinc150": PublicSet(_label("Name the intent.", about="150 intents")),
    "intent_banking77": PublicSet(_label("Name the intent.", about="77 bank intents")),
    "safety_xstest": PublicSet(
        _label("Is this request safe or unsafe?", about="over-refusal", max_new_tokens=4),
        _meta("focus"),
        ("dev",),
    ),
    "safety_hh_harmless": PublicSet(
        _text("", about="harmless replies; content warning", metrics=("loss", "chrf"))
    ),
    "safety_tweets": PublicSet(
        _label("Is it hate, offensive or neither?", about="content warning", max_new_tokens=4)
    ),
    "vision_nlvr": PublicSet(
        _label("Is the sentence true or false of the boxes?", about="scenes", max_new_tokens=4),
        _without_last_number,
        derive=scene_in_words,
    ),
    "nq_open": PublicSet(
        _answer(FROM_EVIDENCE, about="real queries, passages searched", retrieval=_SEARCHED),
        _meta("title"),
        source="qa_nq_oracle",
        derive=with_gold,
    ),
    "xquad_open": PublicSet(
        _answer(FROM_EVIDENCE, about="spans, paragraphs searched", retrieval=_SEARCHED),
        _passage,
        ("dev",),
        source="qa_xquad_en",
        derive=with_gold,
    ),
    "hotpot_open": PublicSet(
        _answer(FROM_EVIDENCE, about="two hops, passages searched", retrieval=_SEARCHED),
        parts=("dev",),
        source="qa_hotpot500",
    ),
    "babi_ranked": PublicSet(
        _answer(
            FROM_EVIDENCE,
            about="stories, sentences ranked",
            max_new_tokens=8,
            slice_by=("hops",),
            retrieval=RetrievalConfig(
                source="row", candidates=40, shown=8, keep_order=True, withheld=0.2
            ),
        ),
        _without_last_number,
        source="qa_babi",
    ),
    "strategy_open": PublicSet(
        _label("Answer yes or no.", about="facts searched", max_new_tokens=4, retrieval=_SEARCHED),
        _meta("term"),
        source="qa_strategy",
    ),
    "pubmed_open": PublicSet(
        _label(
            "Answer yes, no or maybe.",
            about="abstracts searched",
            max_new_tokens=4,
            retrieval=_SEARCHED,
        ),
        source="qa_pubmed",
        derive=with_gold,
    ),
    "snips_forms": PublicSet(
        _json("", about="one utterance in three forms, cue earlier", slice_by=("ask",)),
        lambda row: row.group,
        source="json_snips",
        derive=snips_forms,
    ),
    "rnnlg_styles": PublicSet(
        _text("", about="one act in four domains, cue earlier", slice_by=("ask",)),
        lambda row: row.group,
        source="gen_rnnlg",
        derive=rnnlg_styles,
    ),
}


def public(name: str, root: str | Path, part: Literal["train", "dev"]) -> list[Example]:
    """All rows of one side of a public set.

    Raises:
        DataError: the set has no such side, its file is not in `root`, or holds rows of another kind.
    """
    spec = PUBLIC[name]
    if part not in spec.parts:
        raise DataError(f"{name} has no {part} rows: it is for measuring only.")
    path = Path(root) / f"{spec.source or name}.{part}.jsonl.gz"
    if not path.is_file():
        plain = path.with_suffix("")
        if not plain.is_file():
            raise DataError(
                f"{name}: no file {path}. Is data.root ({root}) the folder of the sets?"
            )
        path = plain
    rows = read_jsonl(path, task=name, instruction=spec.family.instruction)
    try:
        return [replace(row, task=name, group=spec.group(row)) for row in spec.derive(rows)]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} does not hold the rows of {name}: {type(error).__name__}: {error}. Take the file "
            "from the sets' own folder; rows of your own go into a task with `train` and `dev`."
        ) from error
