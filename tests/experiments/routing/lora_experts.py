"""Two small experts as PEFT LoRAs, and rows to train and measure on."""

import torch

from bem.adapters.lora import Update
from bem.tasks.load import Task
from bem.training.data import Example

SHAPES = {"model.layers.1.self_attn.o_proj": (32, 32), "model.layers.3.mlp.down_proj": (32, 64)}
"""Only some layers: (out, in)."""


def updates(seed, rank=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        site: Update(
            torch.randn(d_out, rank, generator=generator) / 3,
            torch.randn(rank, d_in, generator=generator) / 3,
        )
        for site, (d_out, d_in) in SHAPES.items()
    }


def rows(n=6):
    return [
        Example(f"r{i}", f"name the value {i}", ("return", "docstring")[i % 2 :][:1])
        for i in range(n)
    ]


def task():
    return Task("t", rows(), rows(), ("em", "loss"), "em", max_new_tokens=4)
