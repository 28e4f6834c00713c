"""The model card of a saved adapter. It is for people: nothing that loads reads it."""

from __future__ import annotations

from pathlib import Path

from bem.files import write_text

CARD = "README.md"
HEADING = "## How to load it"
WITH_BEM = f"""
{HEADING}

```python
import bem  # makes PEFT know this kind of adapter

attached = bem.load(model, folder)
# or, with PEFT alone:
model = peft.PeftModel.from_pretrained(model, folder)
```
"""
AS_LORA = f"""
{HEADING}

It is a plain LoRA: anything that reads PEFT's LoRAs reads it. With BEM, which also checks that base and
files are the ones it was saved with:

```python
attached = bem.load(model, folder)
```
"""


def write_card(folder: Path, base_name: str | None, variant: str) -> None:
    """Write the card of an adapter on the base `base_name`."""
    head = [f"base_model: {base_name}"] if base_name else []
    head += ["library_name: peft", "pipeline_tag: text-generation", f"tags: [bem, {variant}]"]
    about = f"# Adapter `{variant}`" + (f" for `{base_name}`" if base_name else "")
    how = AS_LORA if variant == "s0" else WITH_BEM
    write_text(folder / CARD, "\n".join(["---", *head, "---", "", about, how]))


def say_how_to_load(folder: Path) -> None:
    """Add how to load the adapter to a card that PEFT wrote."""
    card = folder / CARD
    if card.is_file() and HEADING not in (text := card.read_text(encoding="utf-8")):
        write_text(card, text.rstrip() + "\n" + WITH_BEM)
