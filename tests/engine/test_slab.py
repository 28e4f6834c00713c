"""Every row is written and read at its own place."""

import torch

from bem.engine.slab import GROWTH, Place, Slab

CPU = torch.device("cpu")


def write(slab: Slab, place: Place, first: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that number the new tokens from `first` on, row by row; values are their negatives."""
    n = len(place.slots) * place.width
    keys = torch.arange(first, first + n).view(len(place.slots), 1, place.width, 1)
    return slab.cache(place, None).update(keys, -keys, 0)


def test_rows_are_written_behind_what_they_hold_and_padding_is_written_over():
    slab = Slab(1, 4)
    place = Place([1, 3], [0, 0], [3, 2], CPU)
    keys, values = write(slab, place, 10.0)
    assert keys[:, 0, :, 0].tolist() == [[10, 11, 12], [13, 14, 15]] and torch.equal(values, -keys)
    place = Place([1, 3], [3, 2], [1, 1], CPU)
    keys, _ = write(slab, place, 20.0)
    assert keys[:, 0, :, 0].tolist() == [[10, 11, 12, 20], [13, 14, 21, 0]]
    assert place.mask()[:, 0, 0].tolist() == [[True] * 4, [True, True, True, False]]
    assert place.run is None and Place([1, 2], [3, 2], [1, 1], CPU).run == slice(1, 3)


def test_what_was_taken_can_be_put_into_another_slot_and_slots_can_be_moved():
    slab = Slab(1, 3)
    write(slab, Place([0], [0], [5], CPU), 1.0)
    slab.put(2, 1, 3, slab.take(0, 3, 5))
    assert slab.layers[0].keys[2, 0, :4, 0].tolist() == [0, 4, 5, 0]
    slab.move(0, 1, 2)
    assert slab.layers[0].values[1, 0, :3, 0].tolist() == [-1, -2, 0]


def test_room_grows_with_the_longest_sequence_and_keeps_what_is_there():
    slab = Slab(2, 2)
    assert slab.nbytes == 0
    write(slab, Place([1], [0], [4], CPU), 1.0)
    assert slab.nbytes == 2 * 2 * GROWTH * 4  # of the one layer that was used
    write(slab, Place([1], [4], [GROWTH], CPU), 5.0)
    assert slab.layers[0].keys[1, 0, : GROWTH + 4, 0].tolist() == list(range(1, GROWTH + 5))
    assert slab.layers[0].room == slab.layers[1].room == 2 * GROWTH
