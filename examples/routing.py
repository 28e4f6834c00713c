"""Three experts side by side on the shipped base, and a router that learns which one to ask.

Prints one question's answer under every expert and under the router, what the router did in each
chunk and why, and that the saved router answers the same. About half a minute on a CPU.

python examples/routing.py
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import bem
from bem.config import CloningConfig, DataConfig, TrainingConfig
from bem.experts.expert import write_lora
from bem.experts.stack import fixed_updates
from bem.routing.explain import explain
from bem.routing.mount import blank_expert
from bem.tasks.load import load_tasks
from bem.training.answers import greedy_answers
from bem.training.bc import clone
from bem.training.data import encode
from bem.training.fit import fit
from bem.training.traces import trace

folder = Path(tempfile.mkdtemp())
model, tokenizer = bem.load_base("bem-tiny")
tasks = load_tasks(DataConfig(tasks=["doc2name", "sig2json", "sig2doc"], train_rows=200))
mounted = bem.mount(model, [blank_expert(model, task.name, rank=4) for task in tasks])


def under(option, row):
    """The row with its answer under one expert (0: the bare base), whatever the router thinks."""
    return replace(row, meta={**row.meta, "route": [option]})


def answer(mounted, row):
    prompt = encode(row, tokenizer, 512, with_answer=False)
    return tokenizer.decode(greedy_answers(mounted.model, tokenizer, [prompt], 24)[0])


# The experts learn together, each from the rows of its own task.
rows = [under(option, row) for option, task in enumerate(tasks, 1) for row in task.train]
settings = TrainingConfig(steps=40, learning_rate=5e-3)
with mounted.training("experts"):
    fitted = fit(mounted, tokenizer, rows, settings, folder / "training", seed=0)
print(f"experts: loss {fitted.losses[0]:.2f}, then {fitted.final_loss:.2f} nats per token")

# The router learns from what every expert would have lost.
read = [encode(row, tokenizer, 512) for task in tasks for row in task.train[:50]]
cloning, pad_id = CloningConfig(rounds=0), tokenizer.pad_token_id
traces = trace(mounted, read, pad_id, cloning)
found = clone(mounted, read, traces, pad_id, cloning, seed=0).accuracy[-1]
print(f"router: {found.accuracy:.0%} of held-out answers as the oracle, chance {found.chance:.0%}")

question = tasks[1].dev[0]
print(f"\n{question.prompt}")
for option, name in enumerate(["base", *mounted.router.space.experts]):
    print(f"  {name:8}  {answer(mounted, under(option, question))}")
print(f"  router -> {answer(mounted, question)}")
prompt = encode(question, tokenizer, 512, with_answer=False)
for chunk in explain(mounted, prompt.input_ids, [*prompt.turn_starts[:-1], True]):
    print(f"  chunk {chunk.chunk}: {chunk.expert}, {chunk.rank} ranks: {chunk.why}")

before = answer(mounted, question)
mounted.save(folder / "router")
mounted.detach()  # the base is itself again, bit for bit
again = bem.load_router(model, folder / "router")
print(f"\nsaved and loaded it says the same: {answer(again, question) == before}")
gate = torch.tensor([0.0, 1.0, 0.0])  # sig2json alone
print("as a plain PEFT LoRA:", write_lora(fixed_updates(again.stacks, gate), folder / "lora"))
