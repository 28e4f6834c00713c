"""A cached chunk is named by what was applied in it."""

import pytest
import torch

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import VOCAB, tiny_model
from bem.config import EVIDENCE_FEATURES
from bem.control.keys import ChunkKey, chunk_keys
from bem.errors import CacheError

IDS = torch.arange(1, 21)[None].repeat(2, 1)
ROOT = ChunkKey.root("base", torch.float32, 8, "tokenizer")


def attached(variant="v2"):
    return probe.perturbed(bem.attach(tiny_model("llama"), variant, rank=4, chunk_size=8))


def keys(evidence=0.5, ids=IDS, weights="w", root=ROOT, **extra):
    known = torch.full((len(ids), len(EVIDENCE_FEATURES)), evidence)
    with torch.no_grad():
        out = attached().model(input_ids=ids, evidence=known, use_cache=True, **extra)
    return chunk_keys(out.past_key_values.layers[-1], ids, root, weights)


def test_equal_sequences_share_all_keys_and_a_changed_token_only_the_chunks_before_it():
    same = keys()
    assert same[0] == same[1] and len(same[0]) == 3 and len(set(same[0])) == 3
    changed = IDS.clone()
    changed[0, 12] = 60
    first, second = keys(ids=changed)
    assert first[0] == second[0] and first[1] != second[1] and first[2] != second[2]


@pytest.mark.parametrize(
    "other",
    [
        {"evidence": 0.9},  # another control
        {"weights": "x"},
        {"root": ChunkKey.root("other", torch.float32, 8, "tokenizer")},
        {"root": ChunkKey.root("base", torch.bfloat16, 8, "tokenizer")},
        {"root": ChunkKey.root("base", torch.float32, 16, "tokenizer")},
        {"root": ChunkKey.root("base", torch.float32, 8, "another")},
    ],
)
def test_other_control_weights_or_roots_give_other_keys(other):
    assert not set(keys()[0]) & set(keys(**other)[0])


def test_padding_is_no_part_of_a_key():
    mask = torch.ones(1, 23, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    names = keys(ids=padded, attention_mask=mask, position_ids=positions)
    assert names[0] == keys()[0]


def test_extending_by_hand_gives_the_names_that_the_cache_gives():
    model = attached("v1").model
    with torch.no_grad():
        cache = model(input_ids=IDS[:1], use_cache=True).past_key_values
    _, control = cache.layers[-1].applied()
    key = ROOT
    for chunk, (a, b) in enumerate(((0, 8), (8, 16), (16, 20)), 1):
        key = ChunkKey.extend(key, IDS[0, a:b].tolist(), control[0, chunk], "w")
    assert chunk_keys(cache.layers[-1], IDS[:1], ROOT, "w")[0][-1] == key


def test_a_zero_is_a_zero_whatever_its_sign():
    assert ROOT.extend([1], torch.tensor([0.0]), "w") == ROOT.extend([1], torch.tensor([-0.0]), "w")


def test_the_continuing_state_is_named_by_who_decides_and_the_chunk_is_not():
    assert ROOT.state("a") != ROOT.state("b") != ROOT.digest


@pytest.mark.parametrize("variant", ["pt1", "v1", "v2", "v4"])
def test_names_are_the_same_alone_in_a_batch_and_through_the_cache(variant):
    """20 sequences of 60 tokens: the last bits of their hidden states differ, what is applied does not."""
    model, size = attached(variant).model, 60
    ids = torch.randint(1, VOCAB, (20, size), generator=torch.Generator().manual_seed(5))
    evidence = (
        {} if variant != "v2" else {"evidence": torch.full((20, len(EVIDENCE_FEATURES)), 0.5)}
    )

    def names(rows, cuts):
        given = {k: v[rows] for k, v in evidence.items()}
        cache = None
        for a, b in zip([0, *cuts], [*cuts, size], strict=True):
            out = probe.forward(
                model, ids[rows, a:b], past_key_values=cache, use_cache=True, **given
            )
            cache = out.past_key_values
        return chunk_keys(cache.layers[-1], ids[rows], ROOT, "w")

    together = names(slice(0, 20), [])
    assert [names(slice(r, r + 1), [])[0] for r in range(20)] == together
    assert names(slice(0, 20), [7, 8, 30, 31, 32]) == together


def test_tokens_that_are_not_the_cache_s_are_refused():
    cache = attached().model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(CacheError, match="must be what the cache holds"):
        chunk_keys(cache.layers[-1], IDS[:, :5], ROOT, "w")


def test_a_salt_gives_another_root_and_none_the_same():
    assert ROOT.salted("") == ROOT
    assert len({ROOT, ROOT.salted("a"), ROOT.salted("b")}) == 3
    assert ROOT.salted("a") == ROOT.salted("a")
