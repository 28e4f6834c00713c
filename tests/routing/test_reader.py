"""What the router reads of each token and keeps of each chunk."""

import torch
import torch.nn.functional as F

from bem.routing.reader import Reader

D, D_READ, MEMORY = 6, 3, 4


def reader() -> Reader:
    torch.manual_seed(0)
    return Reader(D, D_READ, MEMORY)


def test_embeddings_and_memory_are_those_of_the_definition():
    r = reader()
    hidden = torch.randn(2, 5, D)
    z = F.linear(hidden, r.token.weight, r.token.bias)
    torch.testing.assert_close(r.embed(hidden), z[..., :D_READ].tanh() * z[..., D_READ:].sigmoid())
    cell = torch.nn.GRUCell(D_READ, MEMORY)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in r.gru.state_dict().items()})
    sums, memory = torch.randn(2, 3, D_READ), torch.randn(2, MEMORY)
    after = r.update_memory(sums, memory)
    for k in range(3):
        memory = cell(sums[:, k], memory)
        torch.testing.assert_close(after[:, k], memory)


def test_the_memory_goes_on_where_it_stopped():
    r = reader()
    sums, start = torch.randn(2, 5, D_READ), torch.zeros(2, MEMORY)
    whole = r.update_memory(sums, start)
    first = r.update_memory(sums[:, :2], start)
    torch.testing.assert_close(r.update_memory(sums[:, 2:], first[:, -1]), whole[:, 2:])


def test_a_rescaled_reader_embeds_hidden_states_as_it_embedded_scaled_ones():
    r = reader()
    hidden, centre, spread = 3 * torch.randn(2, 5, D) + 1, torch.randn(D), torch.rand(D) + 0.5
    before = r.embed((hidden - centre) / spread)
    r.rescale(centre, spread)
    torch.testing.assert_close(r.embed(hidden), before)
