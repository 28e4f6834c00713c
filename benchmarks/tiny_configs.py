"""A tiny random model of any causal LM class of transformers: its config's sizes, made small by name.

`SIZES` holds for every config that has a field of that name; `SPECIAL` says what one model type needs
besides, or what its field means there. Lists with an entry per layer are thinned to `LAYERS`, so that
every kind of layer appears.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bem.adapters.checks_models import VOCAB

LAYERS = 4
CLASSES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model type -> class name."""


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_each(VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    **_each(32, "hidden_size d_model n_embd emb_dim embedding_dim embedding_size"),
    **_each(32, "word_embed_proj_dim attention_hidden_size lru_width"),
    **_each(
        48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner"
    ),
    **_each(
        48, "dim_ff dff d_inner intermediate_size_mlp dense_intermediate_size feed_forward_size"
    ),
    **_each(24, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    **_each(24, "moe_shared_expert_intermediate_size shared_experts_intermediate_size"),
    **_each(24, "expert_ffn_hidden_size"),
    **_each(LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    **_each(LAYERS, "num_encoder_layers num_decoder_layers num_blocks"),
    **_each(4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads"),
    **_each(4, "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    **_each(4, "attention_heads swa_num_attention_heads linear_num_heads"),
    **_each(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups"),
    **_each(8, "head_dim swa_head_dim kv_channels dim_head d_head attention_head_size"),
    **_each(8, "linear_head_dim linear_key_head_dim linear_value_head_dim"),
    **_each(2, "linear_num_key_heads"),
    **_each(4, "linear_num_value_heads"),
    **_each(128, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length"),
    **_each(128, "context_length max_target_positions original_max_position_embeddings"),
    **_each(128, "sliding_window sliding_window_size attention_window_size window_size"),
    **_each(128, "local_attention attention_chunk_size keep_window_size"),
    # experts
    **_each(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_each(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    **_each(1, "num_shared_experts n_shared_experts moe_num_shared_experts"),
    **_each(1, "n_group num_expert_group topk_group first_k_dense_replace num_dense_layers"),
    # multi-head latent attention and its indexer
    **_each(16, "q_lora_rank kv_lora_rank o_lora_rank"),
    **_each(4, "qk_rope_head_dim"),
    **_each(8, "qk_nope_head_dim v_head_dim index_head_dim"),
    **_each(12, "qk_head_dim"),
    **_each(2, "index_n_heads"),
    **_each(128, "index_topk"),
    # state space models
    **_each(
        8, "mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim mamba_chunk_size"
    ),
    **_each(8, "mamba_dt_rank time_step_rank chunk_size"),
    **_each(8, "mamba_n_heads mamba_num_heads"),
    **_each(1, "mamba_n_groups n_groups mamba_ngroups"),
    # what is drawn, and what must not be
    **_each(0.2, "initializer_range init_std initializer_factor emb_init_std"),
    **_each(0.0, "dropout attention_dropout activation_dropout attn_pdrop embd_pdrop resid_pdrop"),
    **_each(
        0.0, "hidden_dropout hidden_dropout_prob attention_probs_dropout_prob summary_first_dropout"
    ),
    **_each(0, "pad_token_id pad_index encoder_no_repeat_ngram_size"),
    **_each(None, "forced_eos_token_id forced_bos_token_id begin_suppress_tokens"),
    **_each(1, "bos_token_id"),
    **_each(2, "eos_token_id"),
}

PER_LAYER = [
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "indexer_types",
    "no_rope_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "activation_sparsity_pattern",
    "block_types",
    "attn_layers",
]

_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
"""With multi-head latent attention every head has its keys, and positions turn a part of each."""
_DECODER = {"is_decoder": True}
_ENCODERS_THAT_DECODE = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
]
_SHARED_KEYS = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_DOTS = {
    f"swa_{n}": 4 for n in ("num_attention_heads", "num_key_value_heads", "qk_rope_head_dim")
} | {
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 12,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
    "head_dim": 12,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 128,
    "indexer_compress_ratio": 4,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "hc_lowrank": 8,
}

_ASSISTANT = {
    **{
        "model_type": "gemma4_text",
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * 4,
    },
    **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0),
    **{"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCAB},
}

SPECIAL: dict[str, dict[str, Any]] = {
    **{kind: _DECODER for kind in _ENCODERS_THAT_DECODE},
    **_each({"hidden_size_global": 32}, "blt_local_encoder blt_local_decoder"),
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            },
            "full_attention": None,
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "dots3_note": _DOTS,
    "dots3_note_text": _DOTS,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {**_SHARED_KEYS, "laurel_rank": 8, "hidden_size_per_layer_input": 8},
    "gemma4_text": {**_SHARED_KEYS, "hidden_size_per_layer_input": 8},
    "gemma4_unified_text": _SHARED_KEYS,
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 8, "num_heads": 8},
    "MptAttentionConfig": {"attn_pdrop": 0},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "roc_bert": {**_DECODER, "shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type of a config, or its class where it has none -> the settings that its names alone do not tell."""

START = {"gemma4_assistant": SPECIAL["gemma4_assistant"]}
"""What a config cannot even be made without."""


def tiny_config(model_type: str) -> Any:
    """The tiny config with which the class of a model type is built."""
    whole_class, wanted = CONFIG_MAPPING[model_type], model_class(model_type).config_class
    return tiny_of(whole_class if wanted is None else wanted)


def tiny_of(config_class: Any) -> Any:
    """A config with every known size made small; the configs inside it too."""
    default = config_class(**START.get(config_class.model_type, {}))
    fields = default.to_dict()
    names = {*fields, *getattr(config_class, "attribute_map", {})}
    settings = {name: size for name, size in SIZES.items() if name in names}
    settings.update((name, thinned(fields[name])) for name in PER_LAYER if fields.get(name))
    if "kv_lora_rank" in names:
        settings.update(_LATENT)
    for name in getattr(config_class, "sub_configs", {}):
        if fields.get(name) is not None:
            settings[name] = tiny_of(type(getattr(default, name))).to_dict()
    kind = config_class.model_type or config_class.__name__
    return config_class(**{**settings, **SPECIAL.get(kind, {})})


def thinned(entries: list[Any]) -> list[Any]:
    """`LAYERS` entries with every kind of the given ones, in their order."""
    kinds = list(dict.fromkeys(entries))
    return [kinds[i % len(kinds)] for i in range(LAYERS)]


def model_class(model_type: str) -> Any:
    """The causal LM class of a model type."""
    return getattr(transformers, CLASSES[model_type])


def tiny_model_of(model_type: str, draw: int = 0) -> Any:
    """A random model of that type. A matrix that starts at zero would hide what stands before it: it is
    drawn too."""
    torch.manual_seed(draw)
    model = model_class(model_type)(tiny_config(model_type))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(0.0, 0.2)
    return model
