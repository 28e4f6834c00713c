"""What the router hears and remembers."""

import torch
import torch.nn.functional as F

from bem.routing.reader import Reader

D, HEARD, MEMORY = 6, 3, 4


def reader() -> Reader:
    torch.manual_seed(0)
    return Reader(D, HEARD, MEMORY)


def test_words_and_memory_are_those_of_the_definition():
    r = reader()
    hidden = torch.randn(2, 5, D)
    z = F.linear(hidden, r.token.weight, r.token.bias)
    torch.testing.assert_close(r.hear(hidden), z[..., :HEARD].tanh() * z[..., HEARD:].sigmoid())
    cell = torch.nn.GRUCell(HEARD, MEMORY)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in r.gru.state_dict().items()})
    heard, memory = torch.randn(2, 3, HEARD), torch.randn(2, MEMORY)
    found = r.remember(heard, memory)
    for k in range(3):
        memory = cell(heard[:, k], memory)
        torch.testing.assert_close(found[:, k], memory)


def test_the_memory_goes_on_where_it_stopped():
    r = reader()
    heard, start = torch.randn(2, 5, HEARD), torch.zeros(2, MEMORY)
    whole = r.remember(heard, start)
    first = r.remember(heard[:, :2], start)
    torch.testing.assert_close(r.remember(heard[:, 2:], first[:, -1]), whole[:, 2:])


def test_a_rescaled_reader_hears_hidden_states_as_it_heard_scaled_ones():
    r = reader()
    hidden, centre, spread = 3 * torch.randn(2, 5, D) + 1, torch.randn(D), torch.rand(D) + 0.5
    before = r.hear((hidden - centre) / spread)
    r.rescale(centre, spread)
    torch.testing.assert_close(r.hear(hidden), before)
