"""Evidence stands in the prompt before the first token, comes within its time, and the answer says what it was."""

import openai
import pytest

from bem.evidence.index import build, open_index
from bem.evidence.passages import Passage
from bem.evidence.rerank import load_reranker
from bem.evidence.retriever import Retriever
from bem.training.data import encode
from bem.training.example import Example
from tests.serving.running import base, client, replayed, served
from tests.serving.test_api import chat, complete

CORPUS = [
    Passage("p1", "Marie Curie won the Nobel prize in physics in 1903.", "Curie"),
    Passage("p2", "Oslo is the capital of Norway."),
    Passage("p3", "A list in Python is written in square brackets."),
    Passage("p4", "The Nobel prize in peace is given in Oslo."),
]
QUESTION = "who won the nobel prize in physics"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence") / "index"
    build(CORPUS, folder)
    return folder


@pytest.fixture(scope="module")
def server(index):
    with served(index=str(index), retrieval_ms=60_000) as running:
        yield running


def asked(server, **bem):
    return chat(client(server), QUESTION, seed=2, extra_body={"bem": bem})


def shown_prompt(passages):
    _, tokenizer = base()
    shown = tuple(p.shown for p in reversed(passages))
    example = Example("x", QUESTION, (), evidence=shown)
    return encode(example, tokenizer, 999, with_answer=False).input_ids


def test_the_best_of_the_index_is_shown_next_to_the_question_and_named(server, index):
    answer = asked(server, retrieve=True)
    found = Retriever(open_index(index), load_reranker("tiny")).retrieve(QUESTION)
    assert [p["id"] for p in answer.bem["evidence"]["passages"]] == [p.id for p in found.passages]
    assert answer.bem["evidence"]["passages"][0]["text"] == CORPUS[0].shown
    assert answer.bem["evidence"]["features"] == pytest.approx(list(found.record.features()))
    ids = shown_prompt(found.passages)
    assert answer.usage.prompt_tokens == len(ids)
    expected = replayed(server, answer.bem["version"], ids, 12, 2)
    assert answer.choices[0].message.content == expected


def test_a_stream_says_its_evidence_with_its_last_piece(server):
    pieces = list(
        chat(client(server), QUESTION, seed=2, stream=True, extra_body={"bem": {"retrieve": True}})
    )
    assert pieces[-1].bem["evidence"]["passages"] == asked(server, retrieve=True).bem["evidence"]["passages"]  # fmt: skip


def test_passages_of_ones_own_are_judged_and_the_best_are_shown(server):
    texts = [CORPUS[2].text, CORPUS[0].text, CORPUS[1].text, CORPUS[3].text]
    answer = asked(server, evidence=texts)
    passages = answer.bem["evidence"]["passages"]
    assert len(passages) == 3 and passages[0] == {"id": "1", "text": CORPUS[0].text}
    whole = complete(
        client(server), prompt=QUESTION, seed=2, extra_body={"bem": {"evidence": texts}}
    )
    assert whole.bem["evidence"]["passages"] == passages


def test_what_takes_too_long_is_left_out_and_said(index):
    with served(index=str(index), retrieval_ms=1e-3) as hurried:
        evidence = asked(hurried, retrieve=True).bem["evidence"]
    assert evidence["timed_out"] and not any(evidence["features"])


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_body": {"bem": {"retrieve": True, "evidence": ["x"]}}},
        {"extra_body": {"bem": {"retrieve": True}}, "prompt": [3, 4]},
        {"extra_body": {"bem": {"evidence": ["x"] * 65}}},
    ],
)
def test_what_cannot_be_asked_of_evidence_is_refused(server, fields):
    with pytest.raises(openai.BadRequestError):
        complete(client(server), **fields)
