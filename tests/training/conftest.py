"""Attached objects whose every part is known: PEFT's LoRA behind the methods that fit needs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict


class LoraAttached:
    def __init__(self, base, rank=4, dropout=0.0, penalty=0.0):
        base = copy.deepcopy(base)
        base.lm_head.weight.data *= 20  # logits of a size that training can move
        torch.manual_seed(1)
        config = LoraConfig(r=rank, target_modules=["o_proj", "down_proj"], lora_dropout=dropout)
        self.model = get_peft_model(base, config).eval()
        self.model.register_forward_pre_hook(self._without_turns, with_kwargs=True)
        self.weight, self.steps = penalty, 0
        self.config = SimpleNamespace(model_dump=lambda: {"rank": rank})

    def _without_turns(self, model, args, kwargs):
        kwargs.pop("turn_starts", None)  # for adapters with a control; PEFT's LoRA has none
        return args, kwargs

    def named_parameters(self):
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def parameters(self):
        return [p for _, p in self.named_parameters()]

    def penalty(self):
        return self.weight * torch.stack([(p**2).sum() for p in self.parameters()]).sum()

    def after_step(self):
        self.steps += 1

    def state_dict(self):
        return get_peft_model_state_dict(self.model)

    def load_state_dict(self, state):
        set_peft_model_state_dict(self.model, state)


@pytest.fixture
def attach_lora(micro_llama):
    return lambda **options: LoraAttached(micro_llama, **options)
