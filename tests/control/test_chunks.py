import torch

from bem.control.chunks import chunk_starts, slots_needed, turns_from_labels


def starts(valid, turns=None, carried=0, size=4):
    valid = torch.tensor([valid]).bool()
    turns = None if turns is None else torch.tensor([turns]).bool()
    return chunk_starts(valid, turns, torch.tensor([carried]), size)[0].int().tolist()


def test_a_chunk_begins_at_the_first_token_and_every_chunk_size_after():
    assert starts([1] * 9) == [1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_left_padding_does_not_count():
    assert starts([0, 0, 1, 1, 1, 1, 1]) == [0, 0, 1, 0, 0, 0, 1]


def test_a_turn_restarts_the_count():
    assert starts([1] * 9, turns=[0, 0, 1, 0, 0, 0, 0, 0, 0]) == [1, 0, 1, 0, 0, 0, 1, 0, 0]


def test_a_turn_at_padding_starts_nothing():
    assert starts([0, 1, 1, 1, 1], turns=[1, 0, 0, 0, 0]) == [0, 1, 0, 0, 0]


def test_a_running_chunk_goes_on_in_the_next_piece():
    assert starts([1] * 5, carried=3) == [0, 1, 0, 0, 0]
    assert starts([1] * 5, carried=4) == [1, 0, 0, 0, 1]


def test_pieces_agree_with_the_whole():
    torch.manual_seed(0)
    valid = torch.ones(1, 60, dtype=torch.bool)
    turns = torch.rand(1, 60) < 0.1
    whole = chunk_starts(valid, turns, torch.tensor([0]), 7)[0]
    carried, found = 0, []
    for a, b in ((0, 5), (5, 6), (6, 31), (31, 60)):
        piece = chunk_starts(valid[:, a:b], turns[:, a:b], torch.tensor([carried]), 7)[0]
        found.append(piece)
        for begins in piece.tolist():
            carried = 1 if begins else carried + 1
    assert torch.equal(torch.cat(found), whole)


def test_a_turn_starts_where_its_first_answer_token_is_predicted():
    labels = torch.tensor([[-100, -100, -100, 5, 6, -100, -100, 7, 8]])
    assert turns_from_labels(labels)[0].int().tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0]


def test_labels_from_the_first_token_on_are_one_turn():
    assert turns_from_labels(torch.tensor([[5, 6, 7]]))[0].int().tolist() == [1, 0, 0]


def test_slots_suffice_for_any_turns():
    torch.manual_seed(1)
    for _ in range(200):
        tokens, size = int(torch.randint(1, 40, ())), int(torch.randint(1, 9, ()))
        turns = torch.rand(2, tokens) < 0.2
        carried = torch.randint(0, size + 1, (2,))
        begun = chunk_starts(torch.ones(2, tokens).bool(), turns, carried, size).sum(1).max()
        assert begun <= slots_needed(tokens, turns, size)
