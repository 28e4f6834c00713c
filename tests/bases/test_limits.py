"""What a model's own configs say of the end of its texts."""

from types import SimpleNamespace

import pytest

from bem.bases.limits import context_length, own_ends
from tests.conftest import make_llama


def test_positions_are_those_of_the_text_model():
    assert context_length(make_llama(max_position_embeddings=96)) == 96
    text = SimpleNamespace(n_positions=32)
    both = SimpleNamespace(max_position_embeddings=7, get_text_config=lambda: text)
    assert context_length(SimpleNamespace(config=both)) == 32
    assert context_length(SimpleNamespace(config=SimpleNamespace(max_seq_len=None))) is None


@pytest.mark.parametrize(("said", "ends"), [(None, []), (2, [2]), ([2, 5], [2, 5])])
def test_a_model_may_name_no_end_one_or_several(said, ends):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=said))
    assert own_ends(model) == ends
