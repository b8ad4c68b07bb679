"""Tiny models of every architecture family that transformers can build, and one tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = (
    "Question: what is the capital of France? Paris is the capital. The colour of the sky is blue. "
    "I'm sorry, I can't help with that. user assistant system answer "
)

# Whatever of these a family's configuration knows is set; the rest is the family's own.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": {},
    "ctrl": {"dff": 48},
    "deepseek_v2": {**_LATENT, **_GROUPS},
    "deepseek_v3": {**_LATENT, **_GROUPS},
    "diffllama": {},
    "dots1": {**_GROUPS, "n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "falcon": {"head_dim": None},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {
        **_MAMBA2,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 24,
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "jetmoe": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": {},
    "mistral": {},
    "mixtral": {},
    "mpt": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": {},
    "opt": {"word_embed_proj_dim": 16},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "qwen3": {},
    "qwen3_5_text": _LINEAR_ATTENTION,
    "qwen3_moe": {},
    "qwen3_next": {**_LINEAR_ATTENTION, "shared_expert_intermediate_size": 24},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "num_mem_blocks": 1,
    },
}
"""What each family needs beside small sizes; ``None`` leaves a size to the family."""

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {"text": "gemma3_text", "mm_tokens_per_image": 4},
    "llava": {"text": "llama"},
    "idefics3": {"text": "llama"},
    "qwen2_vl": {"text": "qwen2_vl_text"},
}
"""Checkpoints with a vision tower: the family of their text part and further settings."""


@cache
def zoo_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that speaks ChatML."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        show_progress=False,
    )
    core.train_from_iterator([_TEXT * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def zoo_config(family: str) -> Any:
    """Return the tiny configuration of a family of `FAMILIES`."""
    kind = CONFIG_MAPPING[family]
    known = kind()
    sizes = {name: value for name, value in _SIZES.items() if _settable(known, name)}
    sizes |= FAMILIES.get(family, {})
    sizes = {name: value for name, value in sizes.items() if value is not None or "token" in name}
    return kind(vocab_size=len(zoo_tokenizer()), **sizes)


def _settable(config: Any, name: str) -> bool:
    # A layer count under two names is one setting.
    aliases = getattr(config, "attribute_map", {}).values()
    twice = name in ("num_layers", "num_heads") and name not in aliases
    return hasattr(config, name) and not (twice and hasattr(config, "num_hidden_layers"))


def zoo_model(family: str, *, seed: int = 0, layers: int | None = None) -> PreTrainedModel:
    """Return a random float32 model of a family of `FAMILIES`, of about 30,000 weights.

    Parameters
    ----------
    layers
        Decoder blocks, where the family's layer types allow another number than its own.
    """
    config = zoo_config(family)
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float()
    return model.eval()


def zoo_multimodal(family: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a random model of a family of `MULTIMODAL`, whole, with its vision tower."""
    options = dict(MULTIMODAL[family])
    text = options.pop("text")
    kind = CONFIG_MAPPING[family]
    inner = {
        name: value
        for name, value in _SIZES.items()
        if _settable(CONFIG_MAPPING[text](), name) and name != "num_layers"
    }
    vision = dict(_VISION)
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
        inner["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
        }
    torch.manual_seed(seed)
    config = kind(
        text_config={"model_type": text, "vocab_size": len(zoo_tokenizer()) + 8, **inner},
        vision_config=vision,
        **options,
    )
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    return model.eval()


def save_zoo(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Write the tiny model of ``family`` with the tokenizer to ``folder``, and return it."""
    build = zoo_multimodal if family in MULTIMODAL else zoo_model
    build(family, seed=seed).save_pretrained(folder)
    zoo_tokenizer().save_pretrained(folder)
    return folder
