"""The whole way: a config, a trained and measured run, a verdict, a promoted adapter, its answers."""

import json

import pytest
import torch

import bem
from bem import config as configuration
from bem.errors import NotAccepted
from bem.experiments import run as runner
from bem.runs import promotion


@pytest.fixture(scope="module")
def walked(tmp_path_factory, micro_base):
    """A baseline that can hardly learn, and two candidates: one that can, one just like it."""
    home = tmp_path_factory.mktemp("walk")
    data, held_out = home / "rows.jsonl", home / "held_out.jsonl"
    for file, first in ((data, 0), (held_out, 48)):
        rows = [
            {"input": f"return {i}", "references": ["the value"], "group": f"doc{i}"}
            for i in range(first, first + 48)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = home / "walk.yaml"
    path.write_text(f"""
name: walk
base: {micro_base}
seeds: [0]
data: {{tasks: [{{name: mine, train: {data}, dev: {held_out}, max_new_tokens: 4, metric: loss}}]}}
adapters: {{variant: s0, rank: 2, alpha: 0.001, router_layer: 3}}
arms:
  - {{name: frozen, role: baseline}}
  - {{name: learning, adapters: {{alpha: 16, rank: 4, router_layer: 0}}, match: none}}
  - {{name: same, match: none}}
training: {{steps: 30, batch_size: 8, max_length: 64, learning_rate: 0.01}}
gates: {{n_bootstrap: 500, waived: [budget, latency, memory, kv_hit]}}
latency_rounds: 2
""")
    config = configuration.load(path, [f"output={home / 'runs'}"])
    return config, runner.run(config)


def test_the_verdicts_say_what_happened(walked):
    _, result = walked
    learned = result.verdicts["learning"]
    assert learned.decision == "PROMOTE", learned.summary()
    assert learned.effect("quality").gain > 0.001  # a random base can only say so much
    assert result.verdicts["same"].decision != "PROMOTE"


def test_what_was_accepted_is_promoted_and_answers_better_than_the_base(walked, micro_base):
    _, result = walked
    pointer = promotion.promote(result.folder, "learning")
    with pytest.raises(NotAccepted):
        promotion.promote(result.folder, "same")
    current = promotion.current(result.folder.parent)
    assert current == pointer

    model, tokenizer = bem.load_base(str(micro_base))
    asked = tokenizer("User: return 7\nAssistant:", return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([asked["input_ids"], torch.tensor([tokenizer(" the value")["input_ids"]])], 1)
    labels = ids.clone()
    labels[:, : asked["input_ids"].shape[1]] = -100
    with torch.no_grad():
        before = model(ids, labels=labels).loss
        attached = bem.load(model, current.checkpoint)
        after = attached.model(input_ids=ids, labels=labels).loss
    assert after < before - 0.3


def test_a_second_run_stands_on_the_first(walked):
    config, result = walked
    again = runner.run(config)
    assert again.verdicts["learning"].to_dict() == result.verdicts["learning"].to_dict()
