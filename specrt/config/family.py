"""What sets a family of targets apart, as data, and its configuration's keys under one name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specrt.config.form import Activation, Form, LayerKind
from specrt.config.values import flag, positive, size_of
from specrt.types import CheckpointError

_REQUIRED = object()


@dataclass(frozen=True)
class Keys:
    """The keys of one ``config.json``, under Llama's names and with the family's own defaults."""

    data: Mapping[str, Any]
    source: str
    """What errors call the file."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What a family calls a key of Llama's, which it takes too."""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def fail(self, message: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self.source}: {message}")

    def name(self, key: str) -> str:
        """What a key is called here."""
        own = self.names.get(key, key)
        return key if own not in self.data and key in self.data else own

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value, or the family's default; a null stays a null, as in transformers."""
        return self.data.get(self.name(key), self.defaults.get(key, default))

    def size(self, key: str) -> int:
        """A number of things. Raises CheckpointError: it is missing or none."""
        value = self.get(key, _REQUIRED)
        if value is _REQUIRED:
            raise self.fail(f"missing key {self.name(key)}")
        return size_of(value, self.name(key), self.source)

    def flag(self, key: str) -> bool:
        """A truth value, False where nobody says. Raises CheckpointError: it is none."""
        return flag(self.get(key, False), self.name(key), self.source)

    def positive(self, key: str) -> float:
        """A positive number. Raises CheckpointError: it is none."""
        return positive(self.get(key), self.name(key), self.source)

    def optional(self, key: str) -> float | None:
        """A positive number or, for null, None. Raises CheckpointError: it is neither."""
        return None if self.get(key) is None else self.positive(key)


def plain(keys: Keys) -> tuple[LayerKind, ...]:
    """Layers that are all alike, and say so."""
    kinds = keys.get("layer_types")
    if kinds is not None:
        kinds = kinds if isinstance(kinds, list) else [kinds]
        other = sorted({str(kind) for kind in kinds} - {"full_attention"})
        if other:
            raise keys.fail(
                f"layer_types has {', '.join(other)}, and this family has no sliding attention "
                "window"
            )
    return ()


def unchanged(keys: Keys) -> Mapping[str, Any]:
    """A form that no key changes."""
    return {}


@dataclass(frozen=True)
class Family:
    """A family of targets: all that is not Llama's, and what transformers takes for missing keys.

    The sizes that define a model have no default: a checkpoint without them is broken, not a 7B
    Llama.
    """

    architecture: str
    """The class in ``architectures``."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """By Llama's name of the key. ``partial_rotary_factor`` and ``rope_local_base_freq`` are read
    of families that have a default for them, and of no others."""
    others: tuple[str, ...] = ()
    """Classes of the same tensors, beside its own and the base class of the usual name."""
    runs_as: str | None = None
    """The family that it is in all that is computed and stored; None: none but itself."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What the family calls a key of Llama's."""
    form: Form = field(default_factory=Form)
    """What no key decides."""
    settle: Callable[[Keys], Mapping[str, Any]] = unchanged
    """Fields of the form that keys decide."""
    layers: Callable[[Keys], Sequence[LayerKind]] = plain
    """One a layer, or none where all are alike."""
    qkv_bias: str | bool = False
    """Whether q, k and v have biases, or the key that says so."""
    output_bias: str | bool = False
    mlp_bias: str | bool = False
    has_qk_norm: bool = False
    eps: float | None = None
    """Of norms, where no key says it."""
    has_rope: bool = True
    activations: Mapping[str, Activation] = field(default_factory=dict)
    """What the family means by an activation's name, where that is not what others mean."""
    rope_types: Mapping[str, str] = field(default_factory=dict)
    """The same for types of rope."""
    derived: tuple[str, ...] = ()
    """Which of head_dim and num_key_value_heads follow from other sizes whatever a key says."""
    wanted: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of keys that may change what the model computes, and that are run."""
    judged: str = ""
    """Other keys that the family reads, or that change nothing of it."""

    def keys(self, data: Mapping[str, Any], source: str) -> Keys:
        """The keys of a configuration of this family."""
        return Keys(data, source, self.names, self.defaults)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Its classes, among them the base class, which saves the same tensors less the head."""
        base = self.architecture.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")
        return self.architecture, base, *self.others

    @property
    def known(self) -> frozenset[str]:
        """Keys that are its own."""
        return frozenset({*self.names.values(), *self.wanted, *self.judged.split()})
