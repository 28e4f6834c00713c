"""The pretraining mixture and the loop around it, without the data folder."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import pretrain_base as base
import pretraining_mixture as mix

SENTENCES = [
    "The cell wall protects the plant from too much water in the soil.",
    'In 1865 the "United States" ended a long war, and many people moved to new towns.',
    "A vector has a magnitude and a direction, while a scalar has only a magnitude.",
    "Firms in this market sell the same product at one price for every buyer.",
]


def encode_bytes(text: str) -> list[int]:
    """A tokenizer for tests: special marks, then one token per byte."""
    ids = []
    for part in re.split(r"(<\|\w+\|>)", text):
        if part in mix.SPECIAL_TOKENS:
            ids.append(mix.SPECIAL_TOKENS.index(part))
        else:
            ids += [5 + byte for byte in part.encode()]
    return ids


def drills() -> mix.Drills:
    return mix.Drills(encode_bytes, 300, SENTENCES)


def shelf(documents: list[list[int]], **share: int) -> mix.Shelf:
    lengths = [len(d) for d in documents]
    return mix.Shelf(np.concatenate(documents).astype(np.uint16), np.cumsum(lengths), 0, **share)


def mixture(seed: int = 0) -> mix.Mixture:
    documents = [[mix.BOS, *range(5 + i, 25 + i), mix.EOS] for i in range(30)]
    return mix.Mixture({"prose": shelf(documents)}, drills(), seed, {"prose": 0.7, "drills": 0.3})


# ---------------------------------------------------------------------------------------- documents


def test_a_module_lies_on_the_side_that_its_name_hashes_to():
    sides = {name: mix.split_of(name) for name in ("os", "re", "json", "ast", "pydoc_data")}
    assert sides == {
        "os": "test",  # md5 ends in ...0 modulo 10
        "re": "dev",
        "json": "train",
        "ast": "train",
        "pydoc_data": "train",
    }


def test_library_text_comes_from_the_train_side_only():
    files = list(mix.library_files())
    names = {f.stem if f.parent.name.startswith("python") else f.parts for f in files}
    assert len(files) > 100
    assert "os" not in names
    assert "re" not in names and not any(f.parent.name == "re" for f in files)


def test_a_chat_starts_with_bos_and_each_answer_ends_with_eos():
    assert mix.chat("q", "a", "r", "b") == (
        "<|bos|><|user|>q<|assistant|>a<|eos|><|user|>r<|assistant|>b<|eos|>"
    )


# ------------------------------------------------------------------------------------------- drills


def test_the_same_seed_gives_the_same_drills():
    first, second = ([d.ids.tolist() for d in draws(7)] for _ in range(2))
    assert first == second
    assert first != [d.ids.tolist() for d in draws(8)]


def draws(seed: int) -> list[mix.Piece]:
    rng = np.random.default_rng(seed)
    made = drills()
    return [made.draw(rng) for _ in range(40)]


def test_random_spans_come_back_and_only_what_can_be_foretold_is_learned():
    for seed in range(20):
        piece = drills().repeats(np.random.default_rng(seed))
        ids = piece.ids.tolist()
        assert piece.learn.any()
        for at in np.flatnonzero(piece.learn):
            pair = ids[at - 1 : at + 1]  # the token and the one before it stood together earlier
            assert any(ids[i : i + 2] == pair for i in range(at - 1))


@pytest.mark.parametrize("kind", ["cue_to_fields", "quoted_span", "slots", "key_value"])
def test_what_a_json_answer_says_stands_in_the_prompt(kind: str):
    rng = np.random.default_rng(1)
    seen = 0
    for _ in range(60):
        text = getattr(drills(), kind)(rng)
        prompt, answer = text.split("<|eos|>")[0].split("<|assistant|>")
        if not answer.startswith("{"):
            continue
        seen += 1
        for value in json.loads(answer).values():
            # A quoted word loses its quotes in the answer.
            assert value.replace('"', "").lower() in prompt.replace('"', "").lower()
    assert seen > 5


# ---------------------------------------------------------------------------------- packing, mixing


def test_packing_keeps_every_token_and_its_flag():
    rng = np.random.default_rng(0)
    pieces = [
        mix.Piece(rng.integers(0, 99, n), rng.random(n) < 0.5) for n in rng.integers(1, 30, 60)
    ]
    none = mix.Piece(np.zeros(0, dtype=int), np.zeros(0, dtype=bool))
    source = iter(pieces)
    left, targets, flags = none, [], []
    for _ in range(5):
        batch, left = mix.pack(source, rows=3, length=16, left=left)
        assert batch.ids.shape == (3, 17)
        targets += batch.ids[:, 1:].flatten().tolist()
        flags += batch.learn[:, 1:].flatten().tolist()
    whole = np.concatenate([p.ids for p in pieces])
    assert targets == whole[1 : 1 + 5 * 48].tolist()
    assert flags == np.concatenate([p.learn for p in pieces])[1 : 1 + 5 * 48].tolist()
    rest = np.concatenate([left.ids[1:], *(p.ids for p in source)])
    assert rest.tolist() == whole[1 + 5 * 48 :].tolist()


def test_two_processes_read_every_document_once_per_epoch():
    documents = [[i] * 3 for i in range(10, 21)]
    seen = []
    for rank in range(2):
        part = shelf(documents, start=rank, step=2)
        seen += [int(part.draw().ids[0]) for _ in range(len(part.cuts))]
    assert sorted(seen) == list(range(10, 21))


def test_long_documents_are_cut_and_lose_nothing():
    documents = [list(range(5, 2505)), [7, 8]]
    part = shelf(documents)
    pieces = [part.draw().ids for _ in range(len(part.cuts))]
    assert sorted(map(len, pieces)) == [2, 452, 1024, 1024]
    assert sorted(np.concatenate(pieces).tolist()) == sorted(documents[0] + documents[1])


def test_shares_count_tokens_and_drills_lead_at_first():
    early, late = (np.array(list(mixture().chances(p).values())) for p in (0.0, 0.5))
    lengths = np.array([22.0, mixture()._lengths["drills"]])
    np.testing.assert_allclose(early * lengths / (early @ lengths), [0.8, 0.2])
    np.testing.assert_allclose(late * lengths / (late @ lengths), [0.7, 0.3])


def test_a_restored_mixture_goes_on_where_the_other_stopped():
    one, other = mixture(), mixture(seed=5)
    one.batch(2, 64, 0.5)
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        assert np.array_equal(one.batch(2, 64, 0.5).ids, other.batch(2, 64, 0.5).ids)


# --------------------------------------------------------------------------------------------- loop


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    assert [round(base.lr_factor(p), 2) for p in (0.005, 0.02, 0.5, 0.7, 0.85, 1.0)] == [
        0.51, 1.0, 1.0, 1.0, 0.5, 0.0,
    ]  # fmt: skip


def micro_state() -> base.State:
    torch.manual_seed(0)
    model = base.build_model(base.Size(32, 1, 2, 32, 300))
    return base.State(model, base.build_optimisers(model, 0.02, 3e-3), mixture())


def run(out: Path, stops: list[int | None]) -> dict[str, torch.Tensor]:
    out.mkdir()
    plan = base.Plan(None, 8, tokens_per_step=128, micro_tokens=64, row_length=64)
    dev = np.arange(5, 205, dtype=np.uint16).repeat(6)
    for stop in stops:
        state = micro_state()
        base.train(state, plan, out, dev, clock=lambda: 0.0, stop_at_step=stop)
    assert state.step == 8
    return state.model.state_dict()


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path):
    torch.set_num_threads(1)
    whole = run(tmp_path / "whole", [None])
    pieces = run(tmp_path / "pieces", [3, 6, None])
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path: Path):
    state = micro_state()
    base.save(state, tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    checkpoint["mixtures"] *= 2
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="written by 2 processes, this run has 1"):
        base.resume(state, tmp_path / "checkpoint.pt")
