"""Three LoRAs made with plain PEFT, and rows of three skills that a word tells apart."""

import torch
from peft import LoraConfig, get_peft_model

from tests.conftest import make_llama

NAMES = ("json", "sql", "chat")
CUES = {"json": "as json: value", "sql": "select the row", "chat": "how are you now"}


def write_loras(folder):
    """Name -> folder of a random LoRA on q, v and down projections of the micro Llama."""
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        targets = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=targets))
        torch.manual_seed(seed)
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.data.normal_(std=0.3)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in NAMES}


def labelled(n, first=0):
    """n rows of each skill with labels alone."""
    return [
        {"id": f"{name}-{i}", "prompt": f"{cue} {i * 7919 % 1000}", "label": name}
        for i in range(first, first + n)
        for name, cue in CUES.items()
    ]
