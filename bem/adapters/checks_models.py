"""Tiny random models of the architectures that the contract runs on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

VOCAB = 64
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_COMMON = {
    "vocab_size": VOCAB,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
_FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "new_decoder_architecture": False,
}
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
_DROPOUTS = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_ONE_KEY_PER_HEAD = {k: v for k, v in _LLAMA.items() if "key_value" not in k}
_DEEP = {**_LLAMA, "num_hidden_layers": 16, "initializer_range": 0.1}


def _make(config_class: str, model_class: str, sizes: dict[str, Any]) -> Any:
    config = getattr(transformers, config_class)(**{**_COMMON, **sizes})
    return getattr(transformers, model_class)(config)


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": partial(_make, "LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "llama-16": partial(_make, "LlamaConfig", "LlamaForCausalLM", _DEEP),  # more than 20 sites
    "mistral": partial(
        _make, "MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": None}
    ),
    "qwen2": partial(_make, "Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": partial(_make, "Qwen3Config", "Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "gemma": partial(_make, "GemmaConfig", "GemmaForCausalLM", {**_LLAMA, "head_dim": 8}),
    "phi3": partial(_make, "Phi3Config", "Phi3ForCausalLM", _LLAMA),
    "gpt2": partial(_make, "GPT2Config", "GPT2LMHeadModel", {**_GPT2, **_DROPOUTS}),
    "gpt_neox": partial(_make, "GPTNeoXConfig", "GPTNeoXForCausalLM", _ONE_KEY_PER_HEAD),
    "opt": partial(_make, "OPTConfig", "OPTForCausalLM", _OPT),
    "falcon": partial(_make, "FalconConfig", "FalconForCausalLM", _FALCON),
}
"""Name -> what makes the model. Weights are drawn when it is called."""


def tiny_model(architecture: str) -> Any:
    """A random float32 model in eval mode: d_model 32, 64 tokens, dropout off, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ARCHITECTURES[architecture]().float().eval()
