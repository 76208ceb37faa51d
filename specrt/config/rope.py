"""Rotary embedding as a ``config.json`` states it: its type and factors, and how far it reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from specrt.config.family import Family, Keys
from specrt.config.values import flag, positive, size_of

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


class Rope(NamedTuple):
    """What the keys of rotary embedding come to."""

    theta: float
    scaling: dict[str, Any] | None
    """``rope_type`` and that type's numbers; None for plain rotary embedding."""
    context: int
    """Positions the model was made for."""
    rotary_dim: int | None = None
    """Elements of a head that are turned; None: all."""
    local_theta: float | None = None
    """The base in layers that have a window, where it may be another."""
    notice: str | None = None
    """What a user should know of the context, if anything."""


@dataclass(frozen=True)
class _Given:
    """The object of one rotary embedding, and what its type's reader needs beside it."""

    keys: Keys
    values: Mapping[str, Any]
    rotary_dim: int
    max_positions: int
    is_nested: bool

    def positive(self, key: str) -> float:
        if key not in self.values:
            raise self.keys.fail(f"missing key rope_scaling.{key}")
        return positive(self.values[key], f"rope_scaling.{key}", self.keys.source)

    def optional(self, key: str, default: float) -> float:
        return default if self.values.get(key) is None else self.positive(key)

    def original(self) -> int | None:
        """Positions before stretching, where somebody says; the top level's key wins, as in
        transformers, but not over a layer type's own."""
        key = "original_max_position_embeddings"
        said = None if self.is_nested else self.keys.get(key)
        said = self.values.get(key) if said is None else said
        return (
            None if said is None else int(positive(said, f"rope_scaling.{key}", self.keys.source))
        )

    def stretch(self, original: int) -> float:
        """The factor, or what the context was stretched by."""
        return self.optional("factor", self.max_positions / original)


class _Scaling(NamedTuple):
    numbers: dict[str, Any] | None
    context: int
    notice: str | None = None


def read_rope(keys: Keys, family: Family, head_dim: int) -> Rope:
    """Read a configuration's rotary embedding, whichever style it came in.

    Args:
        keys: the configuration.
        family: whose it is.
        head_dim: the size of its heads.

    Raises:
        CheckpointError: a type that is not supported, a factor that is missing or malformed.
    """
    values, local, is_nested = _objects(keys)
    partial = values.get("partial_rotary_factor", keys.get("partial_rotary_factor"))
    rotary_dim = _rotary_dim(keys, partial, head_dim)
    max_positions = keys.size("max_position_embeddings")
    given = _Given(keys, values, rotary_dim, max_positions, is_nested)
    kind = values.get("rope_type", values.get("type", "default"))
    if isinstance(kind, str):
        kind = family.rope_types.get(kind, kind)
    if not isinstance(kind, str) or kind not in _TYPES:
        supported = ", ".join(_TYPES)
        raise keys.fail(f"rope type {kind!r} is not supported (supported: {supported})")
    scaling = _scaled_queries(given, _TYPES[kind](given))
    numbers = None if scaling.numbers is None else {"rope_type": kind, **scaling.numbers}
    theta = values.get("rope_theta", keys.get("rope_theta", 10000.0))
    return Rope(
        positive(theta, keys.name("rope_theta"), keys.source),
        numbers,
        scaling.context,
        None if rotary_dim == head_dim else rotary_dim,
        local,
        scaling.notice,
    )


def _objects(keys: Keys) -> tuple[Mapping[str, Any], float | None, bool]:
    """The object of layers without a window, the base in those with one, and whether objects are
    by layer type."""
    old = keys.get("rope_scaling")
    new = keys.get("rope_parameters")
    for value in (old, new):
        if value and not isinstance(value, Mapping):
            raise keys.fail(f"rope_scaling: expected an object, got {value!r}")
    if "rope_local_base_freq" not in keys.defaults:
        given = old or new or {}
        if {_GLOBAL, _LOCAL} & {*given}:
            raise keys.fail("rope_parameters: this family has one rotary embedding for all layers")
        return given, None, False
    new = new or {}
    if set(new) - {_GLOBAL, _LOCAL}:
        raise keys.fail(f"rope_parameters: expected {_GLOBAL} and {_LOCAL}, got {', '.join(new)}")
    main, local = new.get(_GLOBAL) or {}, new.get(_LOCAL) or {}
    if not isinstance(main, Mapping) or not isinstance(local, Mapping):
        raise keys.fail(f"rope_parameters: expected objects, got {new!r}")
    kind = local.get("rope_type", local.get("type", "default"))
    if kind != "default":
        raise keys.fail(f"rope_parameters.{_LOCAL}: expected rope type 'default', got {kind!r}")
    theta = local.get("rope_theta", keys.get("rope_local_base_freq"))
    return (
        {**main, **(old or {})},
        positive(theta, f"rope_parameters.{_LOCAL}.rope_theta", keys.source),
        bool(new),
    )


def _rotary_dim(keys: Keys, partial: Any, head_dim: int) -> int:
    """Elements of a head that are turned."""
    if partial in (None, 1, 1.0):
        return head_dim
    if "partial_rotary_factor" not in keys.defaults:
        raise keys.fail(f"partial_rotary_factor: expected 1, got {partial!r}")
    name = keys.name("partial_rotary_factor")
    turned = int(head_dim * positive(partial, name, keys.source))
    if not 0 < turned <= head_dim or turned % 2:
        raise keys.fail(
            f"{name}: {partial!r} of head_dim {head_dim} turns {turned} elements, which is no even "
            "number of them"
        )
    return turned


def _default(given: _Given) -> _Scaling:
    return _Scaling(None, given.max_positions)


def _linear(given: _Given) -> _Scaling:
    """Some checkpoints (Vicuna 16k, LongChat) state as max_position_embeddings what was before
    stretching, and as max_sequence_length what came of it; most state the latter."""
    factor = given.positive("factor")
    context = given.max_positions
    said = given.keys.get("max_sequence_length")
    if said is not None:
        said = size_of(said, "max_sequence_length", given.keys.source)
        context = max(context, int(min(said, context * factor)))
    return _Scaling({"factor": factor}, context)


def _dynamic(given: _Given) -> _Scaling:
    given.positive("factor")
    return _Scaling(
        None,
        given.max_positions,
        f"the context ends at {given.max_positions} tokens: beyond them dynamic rope would turn "
        "all keys anew as a text grows",
    )


def _llama3(given: _Given) -> _Scaling:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    original = given.original() or given.max_positions
    numbers = {name: given.positive(name) for name in names}
    return _Scaling(
        {**numbers, "original_max_position_embeddings": float(original)}, given.max_positions
    )


def _yarn(given: _Given) -> _Scaling:
    """Source: Peng et al., YaRN, arXiv 2309.00071; mscale as in DeepSeek-V2, arXiv 2405.04434."""
    if "factor" not in given.values:
        raise given.keys.fail("missing key rope_scaling.factor")
    said = given.original()
    original = said or given.max_positions
    factor = given.stretch(original)
    mscale, all_dim = given.values.get("mscale"), given.values.get("mscale_all_dim")
    if mscale and all_dim:
        attention = _mscale(factor, given.positive("mscale")) / _mscale(
            factor, given.positive("mscale_all_dim")
        )
    else:
        attention = _mscale(factor, 1.0)
    truncate = True if given.is_nested else given.values.get("truncate", True)
    numbers = {
        "factor": factor,
        "beta_fast": given.optional("beta_fast", 32.0),
        "beta_slow": given.optional("beta_slow", 1.0),
        "attention_factor": given.optional("attention_factor", attention),
        "original_max_position_embeddings": original,
        "truncate": flag(truncate, "rope_scaling.truncate", given.keys.source),
    }
    # Who adds YaRN to a configuration, as Qwen's cards say, leaves the length that was before.
    stretched = given.max_positions if said is None else int(said * factor)
    return _Scaling(numbers, max(given.max_positions, stretched))


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(given: _Given) -> _Scaling:
    """The short factors. Source: Ding et al., LongRoPE, arXiv 2402.13753."""
    keys, wanted = given.keys, given.rotary_dim // 2
    for name in ("short_factor", "long_factor"):
        value = given.values.get(name)
        if not isinstance(value, list) or len(value) != wanted:
            size = f"{len(value)} of them" if isinstance(value, list) else repr(value)
            raise keys.fail(f"rope_scaling.{name}: expected {wanted} numbers, got {size}")
    short = given.values["short_factor"]
    factors = [positive(value, "rope_scaling.short_factor", keys.source) for value in short]
    original = given.original() or given.max_positions
    stretch = given.stretch(original)
    attention = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    numbers = {
        "factors": factors,
        "attention_factor": given.optional("attention_factor", attention),
    }
    if original >= given.max_positions:
        return _Scaling(numbers, given.max_positions)
    return _Scaling(
        numbers,
        original,
        f"the context ends at {original} of {given.max_positions} tokens: beyond them longrope "
        "turns all keys by other factors",
    )


_TYPES: Mapping[str, Callable[[_Given], _Scaling]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _scaled_queries(given: _Given, scaling: _Scaling) -> _Scaling:
    """Llama 4's scaling of queries by their position is 1 up to where a context was stretched."""
    original = given.original()
    if not given.values.get("llama_4_scaling_beta") or original is None:
        return scaling
    if original >= scaling.context:
        return scaling
    return _Scaling(
        scaling.numbers,
        original,
        f"the context ends at {original} of {scaling.context} tokens: beyond them queries are "
        "scaled by their position",
    )
