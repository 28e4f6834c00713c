"""CLIP and SigLIP towers out of a local folder, through transformers.

    CLIP     patch -> text space: the projection of the last layer's states (Zhou et al. 2022, "Extract Free Dense
             Labels from CLIP"); s = sigmoid(scale * (cos(patch, phrase) - cos(patch, "a photo")))
    SigLIP   patch -> text space: its pooling head on that patch alone; s = sigmoid(scale * cos + bias), its own loss

They describe a picture by the phrases that they are given (`concepts`). What they do not know is only found out from
reference pictures (`familiar`); without them nothing but a blank picture is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from bem.errors import CheckpointError
from bem.vision.scenes import Picture
from bem.vision.tower import Features, patch_deviation
from bem.vision.usual import Usual, fit_usual

KINDS = ("clip", "siglip")
NEUTRAL = "a photo"
FLAT = 2.0
"""Standard deviation, of 255, below which every patch of a blank picture stays."""
SALIENT = 8.0
"""The same, of a patch that a description should name."""


class HFTower:
    """A CLIP or SigLIP.

    Raises:
        CheckpointError: the folder cannot be read, or lacks weights or a tokenizer.
    """

    def __init__(self, folder: Path, concepts: Sequence[str] = ()):
        try:
            self.model: Any = (
                AutoModel.from_pretrained(folder, local_files_only=True).eval().float()
            )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(
                f"{folder} is no CLIP or SigLIP that can be read: {str(error).splitlines()[0]:.200}"
            ) from None
        self.kind = self.model.config.model_type
        if self.kind not in KINDS:
            raise CheckpointError(f"{folder} is a {self.kind}: towers are {', '.join(KINDS)}.")
        self.concepts = tuple(concepts)
        self.size, self.mean, self.std = _preprocessing(folder, self.model.config.vision_config)
        self.patch: int = self.model.config.vision_config.patch_size
        self.usual: Usual | None = None
        self._phrases: dict[str, Tensor] = {}
        self._id = f"{self.kind}@{self._digest()}"

    @property
    def encoder_id(self) -> str:
        """See `VisionTower`: weights, concepts and what is familiar."""
        familiar = "" if self.usual is None else f"+{self.usual.digest[:6]}"
        return self._id + familiar

    def _digest(self) -> str:
        digest = sha256(json.dumps([self.concepts, self.size, self.mean, self.std]).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def familiar(self, pictures: Sequence[Picture]) -> None:
        """Learn what is usual from pictures of the kind that will come; half of them set the limit.

        Raises:
            DataError: fewer than 40.
        """
        seen = torch.cat([self.encode([picture]).summary for picture in pictures])
        self.usual = fit_usual(list(seen[::2, None]), list(seen[1::2, None]))

    def encode(self, images: Sequence[Picture]) -> Features:
        """See `VisionTower`; every picture is brought to the tower's own square."""
        raw = torch.stack([self._square(image) for image in images])
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        side = self.size // self.patch
        with torch.inference_mode():
            summary, patches = self._embed((raw / 255 - mean) / std)
        deviation = patch_deviation(raw[..., : side * self.patch, : side * self.patch], self.patch)
        strange = torch.zeros(len(images))
        if self.usual is not None:
            strange = torch.stack([self.usual.strangeness(s[None]) for s in summary])
        return Features(
            summary, patches, (side, side), torch.ones(patches.shape[:2], dtype=torch.bool),
            deviation > SALIENT, strange, deviation.amax(1) < FLAT, self.encoder_id,
        )  # fmt: skip

    def _square(self, image: Picture) -> Tensor:
        resized = Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(resized).astype(np.float32)).permute(2, 0, 1)

    def _embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors in the space of texts: of each picture, of each of its patches."""
        vision = self.model.vision_model
        states = vision(pixel_values=pixels)
        hidden = states.last_hidden_state
        if self.kind == "clip":  # token 0 is of the whole picture
            project = self.model.visual_projection
            whole, patches = states.pooler_output, vision.post_layernorm(hidden[:, 1:])
            whole, patches = project(whole), project(patches)
        else:
            whole = states.pooler_output
            patches = vision.head(hidden.flatten(0, 1)[:, None]).view(*hidden.shape[:2], -1)
        return F.normalize(whole, dim=-1), F.normalize(patches, dim=-1)

    def support(self, features: Features, phrases: Sequence[str]) -> Tensor:
        """See `VisionTower`: every phrase is known."""
        texts = torch.stack([self._text(phrase) for phrase in (*phrases, NEUTRAL)])
        cosine = features.patches @ texts.mT
        scale = self.model.logit_scale.detach().exp()
        if self.kind == "clip":
            logits = scale * (cosine[..., :-1] - cosine[..., -1:])
        else:
            logits = scale * cosine[..., :-1] + self.model.logit_bias.detach()
        return logits.sigmoid() * features.valid[..., None]

    def _text(self, phrase: str) -> Tensor:
        """Unit vector of a phrase; those of the concepts and the newest others are kept."""
        if phrase not in self._phrases:
            most = self.model.config.text_config.max_position_embeddings
            length = {"padding": "max_length"} if self.kind == "siglip" else {}
            ids = self.tokenizer(
                [phrase], return_tensors="pt", truncation=True, max_length=most, **length
            )["input_ids"]
            with torch.inference_mode():
                state = self.model.text_model(input_ids=ids).pooler_output[0]
                state = self.model.text_projection(state) if self.kind == "clip" else state
            if len(self._phrases) >= 256:
                self._phrases.clear()
            self._phrases[phrase] = F.normalize(state, dim=-1)
        return self._phrases[phrase]


def _preprocessing(folder: Path, vision: Any) -> tuple[int, list[float], list[float]]:
    """(side, mean, std) as the folder's preprocessor_config.json says; the kind's own where there is none."""
    path = folder / "preprocessor_config.json"
    said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    half = [0.5, 0.5, 0.5]
    return vision.image_size, said.get("image_mean", half), said.get("image_std", half)
