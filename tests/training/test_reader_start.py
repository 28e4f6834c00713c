"""A reader that begins as a linear classifier decides as that classifier does."""

import pytest
import torch

from bem.routing.reader import Reader
from bem.training.linear import fit_linear
from bem.training.reader_start import NEVER, UNTAUGHT, Recipe, Turn, start_reader

D, CLASSES = 12, 3


def texts(n=60, chunks=3, signal=0.4):
    """Rows of `chunks` chunks of five tokens; the class shows in the mean of the tokens."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, D, generator=generator)
    hidden, numbers, turns = [], [], []
    for i in range(n):
        noise = torch.randn(5 * chunks + 1, D, generator=generator)
        hidden.append(signal * centres[i % CLASSES] + noise)
        numbers.append(torch.arange(5 * chunks + 1) // 5 + 1)  # the last chunk begins the answer
        wanted = torch.zeros(CLASSES + 2)
        wanted[1 + i % CLASSES] = 1.0
        turns.append(Turn(i, chunks + 1, wanted))
    return hidden, numbers, turns


def logits(reader, bias, hidden, numbers):
    sums = torch.zeros(1, int(numbers.max()), reader.d_read)
    sums[0].index_add_(0, numbers - 1, reader.embed(hidden[None])[0])
    before = torch.cat([torch.zeros(1, 1, reader.d_read), sums], 1)[:, :-1]
    return bias(reader.update_memory(before, torch.zeros(1, reader.width))[0, -1])


@pytest.mark.parametrize("form", ["mean", "sum"])
@pytest.mark.parametrize("decay", [0.9, 0.5, 0.0])
def test_the_reader_says_what_the_classifier_says(form, decay):
    hidden, numbers, turns = texts()
    reader, bias = Reader(D, 8, 10), torch.nn.Linear(10, CLASSES + 2)
    recipe = Recipe(decay, form, 0.1, 1.0)
    start = start_reader(reader, bias, hidden, numbers, turns, torch.arange(60) % 5, recipe)
    assert start.options == [1, 2, 3]
    # the classifier once more, by hand: chunks 1 to 3 lie before the answer
    weight = torch.tensor([decay**2, decay, 1.0]).repeat_interleave(5)
    features = torch.stack([(weight[:, None] * h[:15]).sum(0) / weight.sum() for h in hidden])
    wanted = torch.stack([t.wanted[1:4] for t in turns])
    expected = fit_linear(features, wanted, 3, 0.1).scores(features)
    with torch.no_grad():
        found = torch.stack(
            [logits(reader, bias, h, n) for h, n in zip(hidden, numbers, strict=True)]
        )
    assert (found[:, 1:4].argmax(-1) == expected.argmax(-1)).float().mean() > 0.95
    centred = [z - z.mean(-1, keepdim=True) for z in (found[:, 1:4], expected)]
    together = torch.corrcoef(torch.stack([z.flatten() for z in centred]))[0, 1]
    assert together > 0.97  # tanh bends the largest a little
    assert (found[:, [0, 4]] == NEVER).all()  # nobody wants them


def test_the_recipe_is_chosen_on_left_out_folds_and_its_logits_are_theirs():
    hidden, numbers, turns = texts(signal=0.15)
    reader, bias = Reader(D, 8, 10), torch.nn.Linear(10, CLASSES + 2)
    start = start_reader(reader, bias, hidden, numbers, turns, torch.arange(60) % 5)
    wanted = torch.tensor([t.wanted[1:4].argmax() for t in turns])
    assert start.recipe.decay == 0.9  # every chunk tells as much: the longer the memory the better
    assert (start.logits.argmax(-1) == wanted).float().mean() > 0.6
    loss = torch.nn.functional.cross_entropy(start.logits, wanted)
    for factor in (0.5, 2.0):  # another temperature fits worse
        assert torch.nn.functional.cross_entropy(start.logits * factor, wanted) >= loss - 1e-6


def test_where_no_row_has_two_chunks_to_read_the_memory_is_the_untaught_one():
    hidden, numbers, turns = texts(chunks=1)
    reader, bias = Reader(D, 8, 10), torch.nn.Linear(10, CLASSES + 2)
    start = start_reader(reader, bias, hidden, numbers, turns, torch.arange(60) % 5)
    assert start.recipe.decay == UNTAUGHT


def test_where_the_last_chunk_alone_tells_the_memory_is_short():
    hidden, numbers, turns = texts()
    for h in hidden:
        h[:10] = (
            3 * torch.randn(10, D, generator=torch.Generator().manual_seed(1))[torch.randperm(10)]
        )
    reader, bias = Reader(D, 8, 10), torch.nn.Linear(10, CLASSES + 2)
    assert (
        start_reader(reader, bias, hidden, numbers, turns, torch.arange(60) % 5).recipe.decay < 0.9
    )
