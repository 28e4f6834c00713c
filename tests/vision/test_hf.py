"""CLIP and SigLIP out of folders that are made on the spot: random weights, real arithmetic."""

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)  # fmt: skip

from bem.errors import CheckpointError, DataError
from bem.vision.eyes import Eyes
from bem.vision.load import load_tower
from tests.conftest import make_tokenizer

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {
    **SMALL,
    "vocab_size": 320,
    "max_position_embeddings": 16,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    if request.param == "clip":
        text, vision = CLIPTextConfig(**TEXT), CLIPVisionConfig(**VISION)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    else:
        text, vision = SiglipTextConfig(**TEXT, projection_size=16), SiglipVisionConfig(**VISION)
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def test_patches_are_those_of_the_grid_and_the_summary_is_the_models_own(folder):
    tower = load_tower(folder)
    seen = tower.encode([noise(32, 32), noise(50, 70, seed=1)])
    assert seen.grid == (4, 4) and seen.patches.shape[:2] == (2, 16) and seen.valid.all()
    assert seen.encoder_id == tower.encoder_id and tower.kind in tower.encoder_id
    pixels = torch.from_numpy(noise(32, 32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        own = tower.model.get_image_features(pixel_values=pixels)
        own = own if isinstance(own, torch.Tensor) else own.pooler_output
    own = torch.nn.functional.normalize(own, dim=-1)
    assert torch.allclose(seen.summary[0], own[0], atol=1e-5)
    assert not torch.allclose(seen.summary[0], seen.summary[1], atol=1e-3)


def test_support_is_the_calibrated_cosine_of_patch_and_phrase(folder):
    tower = load_tower(folder)
    seen = tower.encode([noise(32, 32)])
    support = tower.support(seen, ["a dog", "a red circle"])
    assert support.shape == (1, 16, 2) and ((support > 0) & (support < 1)).all()
    text = torch.stack([tower._text(t) for t in ("a dog", "a photo")])
    cosine = seen.patches[0, 3] @ text.T
    scale, model = tower.model.logit_scale.exp(), tower.model
    logit = (
        scale * (cosine[0] - cosine[1])
        if tower.kind == "clip"
        else scale * cosine[0] + model.logit_bias
    )
    assert float(support[0, 3, 0]) == pytest.approx(float(logit.sigmoid().detach()), abs=1e-6)


def test_eyes_describe_a_picture_by_the_given_concepts_and_abstain_on_a_blank(folder):
    eyes = Eyes(load_tower(folder, ["a dog", "a cat"]), conflict=0.0)
    seen = eyes.look(noise(40, 40))
    assert seen.gate == 1 and len(seen.concepts) == 2
    assert eyes.look(np.full((40, 40, 3), 90, np.uint8)).why == "blank"
    assert (
        load_tower(folder, ["a dog"]).encoder_id != eyes.encoder_id != load_tower(folder).encoder_id
    )


def test_what_is_familiar_is_learned_from_pictures(folder):
    tower = load_tower(folder)
    before = tower.encoder_id
    base = noise(32, 32)
    near = [
        np.clip(base.astype(int) + noise(32, 32, seed=s) // 32, 0, 255).astype(np.uint8)
        for s in range(60)
    ]
    tower.familiar(near)
    assert tower.encoder_id.startswith(before + "+")
    assert (tower.encode(near).strangeness <= 1.5).all()
    assert tower.encode([255 - base]).strangeness[0] > 5
    with pytest.raises(DataError, match="20"):
        tower.familiar(near[:10])


def test_what_is_no_tower_is_refused(tmp_path, folder):
    for name in ("tyni", tmp_path / "none"):
        with pytest.raises(CheckpointError, match="no vision tower"):
            load_tower(name)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError):
        load_tower(tmp_path)
