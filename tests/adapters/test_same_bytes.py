"""The same LoRA is the same file, whichever process writes it."""

import os
import subprocess
import sys

WRITE = """
import sys, torch
from bem.adapters.lora import Lora, write_loras
sites = [f"model.layers.{i}.mlp.down_proj" for i in range(9)]
write_loras({site: Lora(torch.ones(2, 4), torch.ones(4, 2), 1.0) for site in sites}, __import__("pathlib").Path(sys.argv[1]))
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    for seed in ("1", "2"):  # of the order in which sets are walked through
        given = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / seed)], env=given, check=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        one, other = ((tmp_path / seed / name).read_bytes() for seed in "12")
        assert one == other
