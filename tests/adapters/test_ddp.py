"""Two processes that average gradients train as one process with the whole batch."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import tiny_model

SETTINGS = {"v1": {"mask": "fixed"}}  # no noise that differs between processes


def gradients(attached, ids, wrapper=None):
    model = wrapper or attached.model
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in attached.named_parameters()}


def worker(rank, port, variant, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    attached = probe.perturbed(
        bem.attach(tiny_model("llama"), variant, rank=4, chunk_size=8, **SETTINGS.get(variant, {}))
    )
    wrapped = torch.nn.parallel.DistributedDataParallel(
        attached.model
    )  # an unused parameter would hang or raise
    found = gradients(attached, probe.token_ids()[rank : rank + 1], wrapped)
    if rank == 0:
        queue.put({n: g.numpy() for n, g in found.items()})
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("variant", ["s0", "pt1", "v1", "v3", "v4"])
def test_two_gloo_processes_equal_one(variant):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=worker, args=(rank, port, variant, queue)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = queue.get(timeout=120)
    for process in processes:
        process.join(timeout=180)  # a busy machine takes its time to end them
    assert [p.exitcode for p in processes] == [0, 0]
    attached = probe.perturbed(
        bem.attach(tiny_model("llama"), variant, rank=4, chunk_size=8, **SETTINGS.get(variant, {}))
    )
    wanted = gradients(attached, probe.token_ids())
    for name, gradient in wanted.items():
        assert torch.allclose(torch.from_numpy(found[name]), gradient, atol=1e-5), name
