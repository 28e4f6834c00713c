"""A cached chunk is named by what was applied in it."""

import pytest
import torch

import bem
from bem.adapters.checks import _perturbed
from bem.adapters.checks_models import tiny_model
from bem.config import EVIDENCE_FEATURES
from bem.control.keys import chunk_keys
from bem.errors import CacheError

IDS = torch.arange(1, 21)[None].repeat(2, 1)


def keys(evidence=0.5, ids=IDS, weights="w", digest="e", **extra):
    attached = _perturbed(bem.attach(tiny_model("llama"), "v2", rank=4, chunk_size=8))
    known = torch.full((len(ids), len(EVIDENCE_FEATURES)), evidence)
    with torch.no_grad():
        cache = attached.model(input_ids=ids, evidence=known, use_cache=True, **extra)
    return chunk_keys(cache.past_key_values.layers[-1], ids, weights, digest)


def test_equal_sequences_share_all_keys_and_a_changed_token_only_the_chunks_before_it():
    same = keys()
    assert same[0] == same[1] and len(same[0]) == 3 and len(set(same[0])) == 3
    changed = IDS.clone()
    changed[0, 12] = 60
    first, second = keys(ids=changed)
    assert first[0] == second[0] and first[1] != second[1] and first[2] != second[2]


@pytest.mark.parametrize("other", [{"evidence": 0.6}, {"weights": "x"}, {"digest": "f"}])
def test_other_evidence_weights_or_passages_give_other_keys(other):
    assert not set(keys()[0]) & set(keys(**other)[0])


def test_padding_is_no_part_of_a_key():
    mask = torch.ones(1, 23, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = keys(ids=padded, attention_mask=mask, position_ids=positions)
    assert len(found[0]) == 3


def test_tokens_that_are_not_the_cache_s_are_refused():
    attached = bem.attach(tiny_model("llama"), "v2", rank=4)
    cache = attached.model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(CacheError, match="must be what the cache holds"):
        chunk_keys(cache.layers[-1], IDS[:, :5], "w")
