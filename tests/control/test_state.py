"""Many sequences in arrays: what belongs to one never reaches another."""

import pytest
import torch

from bem.control.controller import Controller
from bem.control.state import FIRST_CHUNKS, FIRST_FEATURES, KEPT_FEATURES, ControlState, Layout
from bem.errors import CacheError

SIZE, FEATURES, WIDTH = 8, 3, 5


class Sequence:
    """Feeds pieces of one sequence into a slot, as a forward pass does."""

    def __init__(self, state, slot):
        self.state, self.slot = state, slot
        self.reader = Controller(FEATURES, 2, SIZE)

    def read(self, features, valid=None):
        features = features[None]
        valid = torch.ones(features.shape[:2], dtype=torch.bool) if valid is None else valid[None]
        before = self.state.before([self.slot])
        begun = -(-features.shape[1] // SIZE)
        pooled = self.reader.pool(features, valid, None, before, begun)
        control = pooled.number[:, 1:, None].float().expand(-1, -1, WIDTH)  # named by its number
        self.state.append([self.slot], pooled.with_control(control), features, valid, begun)
        return self


def state(slots=3, **changes):
    return ControlState(Layout(FEATURES, WIDTH, WIDTH, SIZE, **changes), slots)


def features(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, FEATURES, generator=generator)


def same(a, b):
    return all(torch.allclose(getattr(a, n), getattr(b, n)) for n in vars(a))


def row(state, slot):
    return state.running.select(torch.tensor([slot]))


@pytest.mark.parametrize("cuts", [[], [1], [3, 8, 9], [8, 16], [19]])
def test_the_state_is_the_same_however_a_sequence_is_cut(cuts):
    x, cut = features(20), state()
    whole = Sequence(state(), 0).read(x).state
    sequence = Sequence(cut, 0)
    for a, b in zip([0, *cuts], [*cuts, 20], strict=True):
        sequence.read(x[a:b])
    assert same(row(cut, 0), row(whole, 0))
    assert torch.allclose(row(whole, 0).sums[0], x[16:].double().sum(0))
    assert torch.allclose(row(whole, 0).done_sums[0], x[:16].double().sum(0))
    assert cut.numbers([0]).tolist() == whole.numbers([0]).tolist() == [[1] * 8 + [2] * 8 + [3] * 4]


def test_decoded_tokens_are_counted_like_read_ones():
    x, cut = features(14), state()
    sequence = Sequence(cut, 1).read(x[:9])
    for t in range(9, 14):
        cut.append_token([1], x[None, t : t + 1])
    assert same(row(cut, 1), row(Sequence(state(), 1).read(x).state, 1))
    assert sequence.state.columns == [0, 14, 0]


def test_sequences_do_not_meet():
    shared = state()
    a, b = shared.begin(), shared.begin()
    Sequence(shared, a).read(features(20, 1))
    Sequence(shared, b).read(features(11, 2))
    Sequence(shared, a).read(features(6, 3))
    alone = Sequence(state(), 0).read(features(11, 2)).state
    assert same(row(shared, b), row(alone, 0)) and shared.columns[b] == 11


def test_a_fork_goes_on_by_itself():
    shared = state()
    a = shared.begin()
    Sequence(shared, a).read(features(13))
    twin = shared.fork(a)
    before = row(shared, a)
    Sequence(shared, twin).read(features(5, 4))
    assert same(row(shared, a), before) and shared.columns == [13, 18, 0]
    assert torch.equal(shared.history([a])[0], shared.history([twin])[0, :3])


def test_a_freed_slot_begins_empty_and_a_full_state_says_so():
    shared = state(slots=1)
    slot = shared.begin()
    Sequence(shared, slot).read(features(13))
    with pytest.raises(CacheError, match="all 1 sequences are taken"):
        shared.begin()
    shared.free(slot)
    again = shared.begin()
    assert same(row(shared, again), row(state(), 0)) and shared.columns == [0]
    shared.free(again)
    with pytest.raises(CacheError, match="free already"):
        shared.free(again)


@pytest.mark.parametrize("keep", [1, 7, 8, 9, 16, 150, 199])
def test_a_cropped_sequence_is_as_if_never_longer(keep):
    x = features(200)
    shared = Sequence(state(), 0).read(x[:120]).read(x[120:]).state
    if keep % SIZE and keep < 200 - KEPT_FEATURES - SIZE:
        with pytest.raises(CacheError, match="Crop to a chunk boundary"):
            shared.crop([0], keep)
        return
    shared.crop([0], keep)
    assert same(row(shared, 0), row(Sequence(state(), 0).read(x[:keep]).state, 0))
    Sequence(shared, 0).read(x[keep:])
    assert same(row(shared, 0), row(Sequence(state(), 0).read(x).state, 0))


@pytest.mark.parametrize("keep", [199, 168, 167, 160])
def test_of_a_first_piece_only_its_end_can_be_cropped_inside_a_chunk(keep):
    x = features(200)
    shared = Sequence(state(), 0).read(x).state
    assert shared.recent.shape[1] == FIRST_FEATURES
    if keep % SIZE and keep < 200 - FIRST_FEATURES:
        with pytest.raises(CacheError, match="features are kept from token 168 on"):
            shared.crop([0], keep)
        return
    shared.crop([0], keep)
    assert same(row(shared, 0), row(Sequence(state(), 0).read(x[:keep]).state, 0))


@pytest.mark.parametrize("decoded", [1, 60, 300])
def test_what_comes_after_the_first_piece_is_kept_beside_its_end(decoded):
    x = features(77 + decoded)
    shared = Sequence(state(), 0).read(x[:77])
    for t in range(77, 77 + decoded):
        shared.read(x[t : t + 1])
    keep = max(77 - FIRST_FEATURES, 77 + decoded - KEPT_FEATURES)
    shared.state.crop([0], keep)
    assert same(row(shared.state, 0), row(Sequence(state(), 0).read(x[:keep]).state, 0))


def test_a_second_crop_does_not_take_what_the_first_one_lost_for_kept():
    """200 columns keep features from 72 on; cut to 150 they still begin there, and not at 22."""
    x = features(200)
    shared = Sequence(state(), 0).read(x[:120]).read(x[120:]).state
    shared.crop([0], 150)
    with pytest.raises(CacheError, match="features are kept from token 88 on"):
        shared.crop([0], 67)
    shared.crop([0], 89)
    assert same(row(shared, 0), row(Sequence(state(), 0).read(x[:89]).state, 0))


def test_sequences_of_different_length_keep_their_own_features():
    shared = state(slots=2)
    a, b = features(50, 1), features(90, 2)
    long, short = Sequence(shared, 1).read(b), Sequence(shared, 0).read(a[:20])
    short.read(a[20:])  # makes room for both
    for slot, x in ((0, a), (1, b)):
        shared.crop([slot], len(x) - 21)
        assert same(row(shared, slot), row(Sequence(state(), 0).read(x[:-21]).state, 0))
    assert long.state is short.state


def test_selecting_repeats_and_reorders_whole_sequences():
    shared = state(slots=2)
    Sequence(shared, 0).read(features(9, 1))
    Sequence(shared, 1).read(features(9, 2))
    chosen = shared.select(torch.tensor([1, 1, 0]))
    assert same(row(chosen, 0), row(shared, 1)) and same(row(chosen, 2), row(shared, 0))


def test_features_of_a_long_sequence_are_not_kept():
    """A chunk's sums and control are kept, the newest features, and a bit per token: nothing else grows."""
    shared = state(slots=1)
    sequence = Sequence(shared, 0)
    sequence.read(features(100))
    for t in range(5000):
        if shared.running.count[0] < SIZE:
            shared.append_token([0], features(1, t)[None])
        else:
            sequence.read(features(1, t))
    assert shared.recent.shape == (1, KEPT_FEATURES, FEATURES)
    assert shared.starts.shape[1] <= 2 * (5100 // SIZE + 2) + FIRST_CHUNKS
    assert shared.valid.numel() <= 2 * 5100


def test_it_can_be_written_to_outside_of_the_inference_mode_it_was_made_in():
    with torch.inference_mode():
        shared = Sequence(state(), 0).read(features(9)).state
    Sequence(shared, 0).read(features(9, 1))
    assert shared.columns[0] == 18
