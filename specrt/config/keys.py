"""Keys of ``config.json``: which are read, which mean nothing to the function, and all others.

A key that nobody here knows may change what the model computes (``no_rope_layers``, a soft cap, a
multiplier). It passes with a value that switches such things off, and is refused by name otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from specrt.config.generation import GENERATION_KEYS
from specrt.types import CheckpointError

_READ = """
    architectures attention_bias bos_token_id compression_config dtype eos_token_id head_dim
    hidden_act hidden_size intermediate_size layer_types max_position_embeddings max_sequence_length
    max_window_layers mlp_bias model_type num_attention_heads num_hidden_layers num_key_value_heads
    original_max_position_embeddings partial_rotary_factor quantization_config rms_norm_eps
    rope_parameters rope_scaling rope_theta sliding_window specrt_storage tie_word_embeddings
    torch_dtype use_sliding_window vocab_size
"""
# Of training, of memory and speed, of other tasks than generation, of tokenizers, or about the
# file itself. pretraining_tp splits a product in parts and adds them up again.
_MEANINGLESS = """
    attn_implementation auto_map classifier_bias classifier_dropout finetuning_task flash_attn
    fused_mlp gradient_checkpointing id2label init_std initializer_range is_decoder is_llama_config
    label2id label_smoothing loss_type max_length max_model_len max_seq_len max_seq_length
    model_max_length n_ctx num_labels output_attentions output_hidden_states
    pad_token_id padding_side params_dtype prefix pretraining_tp problem_type quantization_bit
    return_dict seq_length seq_len tf_legacy_loss task_specific_params tokenizer_class torchscript
    tokenizer_model tokenizer_type tokenizer_name training training_args transformers.js_config
    transformers_weights truncation_side unsloth_fixed use_bfloat16 use_cache use_cache_quantization
    use_cache_kernel use_flash_attention use_flash_attention_2 use_flash_attn use_fused_mlp
    use_fused_rmsnorm use_fused_cross_entropy use_fused_swiglu use_liger_kernel use_memory_efficient
    use_memory_efficient_attention use_xformers vocab_file z_loss
"""
_HARMLESS_KEYS = frozenset({*_READ.split(), *_MEANINGLESS.split(), *GENERATION_KEYS})
_HARMLESS_NAMES = re.compile(
    r"^_"  # transformers' own notes, such as _name_or_path
    r"|(dropout|dropout_prob|_pdrop|drop_rate)$"
    r"|_(version|name|path|token|token_id|token_ids|hash|date|url|license|note|notes|coef|loss)$"
    r"|^(name|version|license|author|authors|date|description|comment|base_model|language|tags)$"
)
# Where 0 or 1 would be no way of saying "off": all layers without rotary embedding, say.
_COUNTED = re.compile(r"(interval|pattern|_layers|_size|_window)$")
_USUAL_WORDS: Mapping[str, tuple[str, ...]] = {
    "activation": ("swiglu", "silu", "swish"),  # beside hidden_act, which decides (Falcon3)
    "attention_type": ("full", "full_attention", "causal"),
    "hidden_activation": ("silu", "swish"),
    "norm_type": ("rmsnorm", "rms_norm"),
    "position_embedding_type": ("rope", "rotary", "absolute"),  # absolute: the base class's default
}


def refuse_unknown_keys(data: Mapping[str, Any], source: str, known: Collection[str] = ()) -> None:
    """Refuse a configuration with a key that may change what the model computes.

    Args:
        data: the content of a ``config.json``.
        source: what errors call the file.
        known: keys that the model's family has for itself.

    Raises:
        CheckpointError: there is one; the message names it.
    """
    for key, value in data.items():
        if key not in known and not _is_harmless(key, value):
            raise CheckpointError(
                f"{source}: {key}: unknown, and {_shown(value)} may change what the model computes "
                "(if it does not, remove the key)"
            )


def _is_harmless(key: str, value: Any) -> bool:
    if key in _HARMLESS_KEYS or _HARMLESS_NAMES.search(key):
        return True
    if key == "no_rope_layers" and isinstance(value, list):
        return all(flag in (1, True) for flag in value)  # 1: this layer has rotary embedding
    if isinstance(value, str):
        return value == "" or value.lower() in _USUAL_WORDS.get(key, ())
    if isinstance(value, (bool, list, dict)) or value is None:
        return not value
    return value == 0 or (value == 1 and not _COUNTED.search(key))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
