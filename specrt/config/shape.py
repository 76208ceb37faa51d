"""What a family's keys come to: sizes of heads, norms' epsilon, and the form of the layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from specrt.config.family import Family, Keys
from specrt.config.form import ACTIVATION_NAMES, Activation, Form, LayerKind
from specrt.config.rope import Rope
from specrt.config.values import positive

_LARGEST_HEAD = 256  # of any device; some take less (models/placement.py)


def form_of(family: Family, keys: Keys, rope: Rope) -> Form:
    """The family's form with what keys decide; a window that hides nothing is none.

    Raises:
        CheckpointError: a key is malformed, or an activation or a kind of layer is not supported.
    """
    has_local = rope.local_theta is not None and (
        rope.scaling is not None or rope.local_theta != rope.theta
    )
    layers = tuple(
        LayerKind(
            kind.window if kind.window is not None and kind.window < rope.context else None,
            "main" if kind.rope == "local" and not has_local else kind.rope,
        )
        for kind in family.layers(keys)
    )
    uses_local = any(kind.rope == "local" for kind in layers)
    settled: dict[str, Any] = {
        "activation": _activation(family, keys),
        "rotary_dim": rope.rotary_dim,
        "local_rope_theta": rope.local_theta if uses_local else None,
        "layers": layers if {*layers} - {LayerKind()} else (),
    }
    return replace(family.form, **{**settled, **family.settle(keys)})


def _activation(family: Family, keys: Keys) -> Activation:
    said = str(keys.get("hidden_act", "silu"))
    found = family.activations.get(said) or ACTIVATION_NAMES.get(said)
    if found is None:
        names = ", ".join(ACTIVATION_NAMES)
        raise keys.fail(f"{keys.name('hidden_act')}: expected one of {names}, got {said}")
    return found


def head_dim_of(family: Family, keys: Keys, num_heads: int) -> int:
    """The size of a head: a key's where the family reads one, else a head's share of the hidden
    size.

    Raises:
        CheckpointError: there is no such size, or kernels do not take it.
    """
    hidden_size = keys.size("hidden_size")
    if "head_dim" in family.derived or keys.get("head_dim") is None:
        if hidden_size % num_heads:
            raise keys.fail(
                f"{keys.name('hidden_size')} {hidden_size} is not a multiple of "
                f"{keys.name('num_attention_heads')} {num_heads}"
            )
        head_dim = hidden_size // num_heads
        _refuse_other(keys, "head_dim", head_dim)
    else:
        head_dim = keys.size("head_dim")
    if head_dim % 2:
        raise keys.fail(f"head_dim: rotary embedding needs an even size, got {head_dim}")
    if head_dim > _LARGEST_HEAD:
        raise keys.fail(f"head_dim: kernels take at most {_LARGEST_HEAD}, the model has {head_dim}")
    return head_dim


def kv_heads_of(family: Family, keys: Keys, num_heads: int) -> int:
    """Heads of keys and values.

    Raises:
        CheckpointError: those of queries are no multiple of them.
    """
    key = "num_key_value_heads"
    if key in family.derived or keys.get(key) is None:
        _refuse_other(keys, key, num_heads)
        return num_heads
    num_kv_heads = keys.size(key)
    if num_heads % num_kv_heads:
        raise keys.fail(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{num_kv_heads}"
        )
    return num_kv_heads


def _refuse_other(keys: Keys, key: str, derived: int) -> None:
    """Refuse a key that says something else than what follows from the others."""
    said = keys.data.get(key)
    if said not in (None, derived):
        raise keys.fail(f"{key}: expected {derived}, which follows from other sizes, got {said!r}")


def intermediate_size_of(keys: Keys) -> int:
    """Between an MLP's products; of GPT-2 and GPT-J four times the hidden size if none is said.

    Raises:
        CheckpointError: it is missing or malformed.
    """
    key = "intermediate_size"
    if key in keys.defaults and keys.get(key) is None:
        return 4 * keys.size("hidden_size")
    return keys.size(key)


def eps_of(family: Family, keys: Keys) -> float:
    """What norms add to the mean square.

    Raises:
        CheckpointError: it is malformed.
    """
    if family.eps is not None:
        return family.eps
    return positive(keys.get("rms_norm_eps", 1e-6), keys.name("rms_norm_eps"), keys.source)
