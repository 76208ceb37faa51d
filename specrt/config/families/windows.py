"""Which layers see only a window of positions, and which go without rotary embedding."""

from __future__ import annotations

from collections.abc import Callable

from specrt.config.family import Keys
from specrt.config.form import LayerKind, RopeChoice

_KINDS = ("full_attention", "sliding_attention")


def window_of(keys: Keys) -> int | None:
    """The window that a configuration states, or None."""
    return None if keys.get("sliding_window") is None else keys.size("sliding_window")


def everywhere(keys: Keys) -> tuple[LayerKind, ...]:
    """The window in all layers, where there is one."""
    window, count = window_of(keys), keys.size("num_hidden_layers")
    wanted = _KINDS[window is not None]
    kinds = keys.get("layer_types")
    if kinds is None:
        kinds = [wanted] * count
    if not isinstance(kinds, list) or len(kinds) < count or set(map(str, kinds)) - {wanted}:
        raise keys.fail(
            f"layer_types: expected {wanted} alone, of {count} layers, beside sliding_window "
            f"{window}, got {kinds!r}"
        )
    return (LayerKind(window=window),) * count


def by_types(
    is_sliding: Callable[[int, Keys], bool],
    *,
    sliding: RopeChoice = "main",
    full: RopeChoice = "main",
    switch: str | None = None,
) -> Callable[[Keys], tuple[LayerKind, ...]]:
    """Layers as ``layer_types`` says.

    Args:
        is_sliding: of layer i, where ``layer_types`` says nothing.
        sliding: the rotary embedding of layers that have the window.
        full: of the others.
        switch: a key without which there is no window at all.
    """

    def layers(keys: Keys) -> tuple[LayerKind, ...]:
        window = window_of(keys) if switch is None or keys.flag(switch) else None
        has_window = sliding_layers(keys, lambda i: window is not None and is_sliding(i, keys))
        if any(has_window) and window is None:
            said = "sliding_window is null" if switch is None else f"{switch} is false"
            raise keys.fail(f"layer_types has sliding_attention, and {said}")
        return tuple(
            LayerKind(window, sliding) if slides else LayerKind(None, full) for slides in has_window
        )

    return layers


def sliding_layers(keys: Keys, is_sliding: Callable[[int], bool]) -> list[bool]:
    """Of each layer whether it has the window, by ``layer_types`` or else by its number.

    Drafters that were cut from a target have its list beside fewer layers.
    """
    count = keys.size("num_hidden_layers")
    kinds = keys.get("layer_types")
    if kinds is None:
        return [is_sliding(index) for index in range(count)]
    if not isinstance(kinds, list) or len(kinds) < count or set(map(str, kinds)) - {*_KINDS}:
        raise keys.fail(f"layer_types: expected {count} of {' and '.join(_KINDS)}, got {kinds!r}")
    return [kind == "sliding_attention" for kind in kinds[:count]]


def every_other(period: int) -> Callable[[int, Keys], bool]:
    """The window in all layers but the last of each ``period``."""
    return lambda index, keys: (index + 1) % period != 0


def by_pattern(index: int, keys: Keys) -> bool:
    """The window in all layers but the last of each ``sliding_window_pattern``."""
    return (index + 1) % keys.size("sliding_window_pattern") != 0
