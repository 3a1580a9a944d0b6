"""A tiny random model of every architecture that transformers builds as a causal language model."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn

VOCABULARY = 128

# What a setting's name says about its size; the first expression that matches decides.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"^vocab_size(_per_layer_input)?$|^(text|word)_vocab_size$", VOCABULARY),
    (r"^(pad|decoder_start)_token_id$", 0),
    (r"^bos_token_id$", 1),
    (r"^eos_token_id$", 2),
    (r"^(num_hidden_layers|num_layers|n_layers?|decoder_layers|encoder_layers|num_hidden_blocks|num_blocks)$", 4),
    (r"^(num_(key_value|kv)_heads|n_head_kv|num_kv_heads|attention_groups)$", 2),
    (r"^(mamba_n_heads|mamba_num_heads)$", 8),
    (r"(^|_)(num_)?(attention_)?heads?$|^num_(encoder_|decoder_)?attention_heads$|_attention_heads$", 4),
    (r"^(mamba_)?(d_head|head_dim)$|head_dim$|^(d_kv|qkv_dim|head_size)$", 8),
    (r"^(hidden_size|n_embd|d_model|embed_dim|dim|dim_model|emb_dim|embedding_size|word_embed_proj_dim)$", 32),
    (r"^(hidden_size_per_layer_input|laurel_rank)$", 8),
    (r"(intermediate_size|ffn_dim|dim_ff|ffn_hidden_size|inner_dim|dff|n_inner|d_ff)$", 48),
    (r"lora_rank$|rank$", 16),
    (r"^(n_group|topk_group|num_expert_group|mamba_n_groups|mamba_ngroups|n_groups|first_k_dense_replace)$", 1),
    (r"^(num_experts_per_tok|num_experts_per_token|moe_top_?k|top_k_experts|moe_topk|top_k)$", 2),
    (r"(num_|n_)(local_|routed_)?experts$|^moe_num_experts$", 4),
    (r"^n_shared_experts$|^num_shared_experts$", 1),
    (r"^(n_positions|max_position_embeddings|max_seq_len|n_ctx|context_length|max_sequence_length)$", 256),
    (r"sliding_window|^window_size$|^attention_window_size$", 8),
    (r"chunk_size$|^attention_chunk_size$", 8),
    (r"^(rotary_dim)$", 4),
    (r"(d_state|state_size)$", 8),
    (r"^(index_topk|index_topk_blocks|index_block_size)$", 8),
    (r"^(ngram_vocab_size_base|unpadded_vocab_size)$", VOCABULARY),
    (r"^(mamba_d_ssm)$", 64),
    (r"^zero_expert_num$", 2),
    (r"^(lru_width)$", 32),
)
# Where names do not tell, or sizes must agree; ...: leave the configuration's own value.
_OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4, "layer_types": ["indexed_attention"] * 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 2},
    "longcat_flash": {"qk_head_dim": ..., "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp_text": {"indexer_n_heads": ..., "indexer_kv_heads": ..., "indexer_head_dim": ...},
    "reformer": {"is_decoder": True, "attn_layers": ["local"] * 4, "axial_pos_embds": False},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
_OTHER_INPUTS = re.compile(r"^text_config$|vision|audio|image|vq|encoder|depth|speech|adapter")


def architectures() -> dict[str, str]:
    """Model type -> class of transformers' causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {name: str(made) for name, made in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def other_inputs(model_type: str) -> str:
    """The parts of an architecture that read something else than text, as the names of their configurations."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parts = getattr(CONFIG_MAPPING[VARIANTS.get(model_type, (model_type, {}))[0]], "sub_configs", None) or {}
    return ", ".join(name for name in parts if _OTHER_INPUTS.search(name))


def tiny_settings(config_class: Any) -> dict[str, Any]:
    """Settings of a configuration with every size small, found by the settings' names; parts of it included."""
    settings: dict[str, Any] = {}
    for name, parameter in inspect.signature(config_class.__init__).parameters.items():
        size = next((size for pattern, size in _SIZES if re.search(pattern, name)), None)
        if size is not None and not isinstance(parameter.default, str | bool | list | dict | tuple | float):
            settings[name] = size
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]  # latent attention has no groups
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        if inspect.isclass(part) and hasattr(part, "model_type") and part.__name__ != "AutoConfig":
            settings[name] = tiny_settings(part)
    own = _OWN.get(config_class.model_type, {})
    return {k: v for k, v in {**settings, **own}.items() if v is not Ellipsis}


# Further settings that change what a block is: norms after the addition, another order.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt (norms after)": ("opt", {"do_layer_norm_before": False}),
    "bloom (residual after the norm)": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "gpt_neox (one after the other)": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon (new)": ("falcon", {"new_decoder_architecture": True}),
    "bert (decoder)": ("bert", {"is_decoder": True}),
    "gemma3n_text (no shared keys)": ("gemma3n_text", {"num_kv_shared_layers": 0}),
}


def tiny_architecture(name: str, seed: int = 0) -> nn.Module:
    """A model (or a variant of one) in float32 and evaluation mode; every parameter is random, norms too."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, changes = VARIANTS.get(name, (name, {}))
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**{**tiny_settings(config_class), **changes})
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        model: nn.Module = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
            for module in model.modules():
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0  # as transformers leaves it when it loads some of them
    return model.requires_grad_(False).eval()
