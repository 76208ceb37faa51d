"""From what a user names to a drafter: the kinds there are, ours and installed ones.

Another package adds a kind by an entry point of the group ``specrt.drafters``: a :class:`Kind`, or
a callable that takes a :class:`DrafterRequest` and gives a drafter. It is imported when it is asked
for, by its name or by a directory that says its name or is none of ours, and never takes a name of
ours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from specrt import builtin
from specrt.draft.eesd.kind import EESD
from specrt.draft.fspad.kind import FSPAD
from specrt.draft.kind import DrafterOptions, DrafterRequest, Kind
from specrt.draft.prompt_lookup.kind import PROMPT_LOOKUP
from specrt.draft.recycle.kind import RECYCLE
from specrt.draft.small_model.kind import SMALL_MODEL
from specrt.targets import target_name

if TYPE_CHECKING:
    import torch

    from specrt.builtin import BundledDrafter
    from specrt.config import ModelConfig
    from specrt.draft.base import Drafter
    from specrt.models.model import LlamaModel

ENTRY_POINTS = "specrt.drafters"
NONE, AUTO = "none", "auto"
WITH_LOOKUP = f"+{PROMPT_LOOKUP.name}"
"""Behind the name or path of a trained drafter: prompt lookup is asked before it."""
_BESIDE = f"{WITH_LOOKUP!r} goes behind the name or directory of an FSPAD or EAGLE drafter"
DEFAULT, BUNDLED_DEFAULT = PROMPT_LOOKUP.name, "fspad"

REGISTRY: Mapping[str, Kind] = {
    kind.name: kind for kind in (PROMPT_LOOKUP, RECYCLE, EESD, FSPAD, SMALL_MODEL)
}
"""By name. Checkpoints are asked for in this order; the last takes whatever is left."""

_METHODS = ("start", "prefill", "propose", "observe", "finish")
_TOLD = (ValueError, OSError, MemoryError)  # a kind's own words to its users


def named_kinds() -> list[Kind]:
    """Those of ours that are asked for by name."""
    return [kind for kind in REGISTRY.values() if kind.matches is None]


def bundled_names() -> list[str]:
    """Those of all targets' bundled drafters, each once."""
    return sorted({one.name for one in builtin.drafters()})


def bundled_for(target: ModelConfig) -> dict[str, BundledDrafter]:
    """The bundled drafters that were made for a model of this architecture, by name."""
    from specrt.config import config_fingerprint

    fingerprint = config_fingerprint(target)
    return {one.name: one for one in builtin.drafters() if one.fingerprint == fingerprint}


def default_drafter(target: ModelConfig, *, is_gpu: bool = False) -> str:
    """What ``"auto"`` means for a target, on the CPU or on a GPU."""
    own = bundled_for(target).get(BUNDLED_DEFAULT)
    if own is None:
        return DEFAULT
    # The bundled target's rounds are so short that looking up takes what it saves.
    has_lookup = own.target != builtin.TARGET and not is_gpu
    return f"{own.name}{WITH_LOOKUP}" if has_lookup else own.name


def drafter_names() -> list[str]:
    """All names that :func:`load_drafter` takes: kinds', bundled drafters', installed ones."""
    ours = [kind.name for kind in named_kinds()]
    return [*ours, *bundled_names(), *_foreign_names()]


def describe_names() -> str:
    """What may be named, in one line, for help."""
    kinds = ", ".join(f"{kind.name!r} ({kind.help})" for kind in named_kinds())
    held = [kind.help for kind in REGISTRY.values() if kind.matches is not None]
    return (
        f"{AUTO!r} (the target's bundled FSPAD, else prompt lookup; on a CPU both), {NONE!r}, "
        f"{kinds}, "
        f"one bundled for the target ({_bundled_by_target()}), the name of an installed one, or a "
        f"directory with {', '.join(held[:-1])} or {held[-1]}; behind an FSPAD or EAGLE drafter "
        f"{WITH_LOOKUP!r}: what is found so is proposed where it promises more (CPU)"
    )


def _bundled_by_target() -> str:
    targets = dict.fromkeys(one.target for one in builtin.drafters())
    return "; ".join(
        f"of {target!r}: {', '.join(map(repr, builtin.drafter_paths(target)))}"
        for target in targets
    )


def check_name(name: str) -> None:
    """Refuse what is no name and does not look like a path.

    Raises:
        CheckpointError: so; says what the names are.
    """
    from specrt.types import CheckpointError

    own, has_lookup = without_lookup(name)
    names = drafter_names() if has_lookup else [NONE, AUTO, *drafter_names()]
    # The empty path is the present folder. What looks like a path is refused with more words.
    is_path = own != "" and (Path(own).exists() or "/" in own)
    if own in names or is_path:
        return
    if has_lookup:
        raise CheckpointError(f"drafter: {_BESIDE}, got {own!r}")
    raise CheckpointError(f"drafter: expected {', '.join(names)} or a directory, got {name!r}")


def without_lookup(name: str) -> tuple[str, bool]:
    """A drafter's own name or path, and whether prompt lookup is asked before it."""
    if not name.endswith(WITH_LOOKUP) or Path(name).exists():
        return name, False
    return name.removesuffix(WITH_LOOKUP), True


def drafter_directory(
    name: str | os.PathLike[str], target: ModelConfig, target_path: Path | None = None
) -> Path:
    """The checkpoint that ``name`` means: a drafter bundled for this target, a directory, or a
    repository.

    Args:
        name: as a user gives it.
        target: the model it shall draft for.
        target_path: where that lies, for messages; None: not known.

    Raises:
        CheckpointError: there is none, or bundled ones of that name are other targets'; as
            :func:`specrt.config.local_path`.
    """
    from specrt.config import checkpoint_directory, local_path

    if not isinstance(name, str) or name not in bundled_names():
        return checkpoint_directory(local_path(name))
    own = bundled_for(target)
    if name not in own:
        raise _of_another_target(name, list(own), target_path)
    return own[name].path


def _of_another_target(name: str, own: list[str], target_path: Path | None) -> ValueError:
    from specrt.types import CheckpointError

    made_for = " and ".join(repr(one.target) for one in builtin.drafters() if one.name == name)
    this = "this target" if target_path is None else repr(target_name(target_path))
    kinds = [kind.name for kind in named_kinds()]
    return CheckpointError(
        f"drafter: the bundled {name!r} was made for the target {made_for}; for {this} there are: "
        f"{', '.join([*own, *kinds])} or a directory"
    )


def check_fit(name: str | os.PathLike[str], target: ModelConfig, target_path: Path) -> None:
    """Refuse a drafter before its target's weights are read; of the Hub nothing is fetched.

    Raises:
        CheckpointError: there is none of that name, or it was made for another target.
    """
    from specrt.config import hub_name

    own = without_lookup(name)[0] if isinstance(name, str) else name
    if own in (NONE, AUTO) or hub_name(own) is not None:
        return
    kind, directory = _find(own, target, target_path)
    if kind.check is not None and directory is not None:
        kind.check(directory, target, target_path)


def load_drafter(
    name: str | os.PathLike[str] | None,
    target: LlamaModel,
    dtype: torch.dtype | None,
    options: DrafterOptions,
    target_path: Path | None = None,
) -> Drafter:
    """Make the drafter a user asks for.

    Args:
        name: None or ``"none"`` (plain decoding), one of :func:`drafter_names`, or a checkpoint
            directory; behind an FSPAD or EAGLE drafter's :data:`WITH_LOOKUP`.
        target, dtype, options, target_path: as in :class:`DrafterRequest`.

    Raises:
        CheckpointError: no such checkpoint, a kind that is not known, or made for another target.
        ValueError: a controller, or narrower weights, tokens or sight, for a drafter that takes
            none; on a GPU, a model that its kernels do not run, or a lookup beside a drafter; one
            beside a drafter that takes none; an installed drafter that is broken.
    """
    from specrt.draft.base import EmptyDrafter

    if isinstance(name, str) and without_lookup(name)[1]:
        return _with_lookup(name, target, dtype, options, target_path)
    if name is None or name == NONE:
        _refuse_control(options)
        _refuse_narrowing(options)
        return EmptyDrafter()
    kind, directory = _find(name, target.config, target_path)
    if not kind.has_control:
        _refuse_control(options)
    if not kind.has_narrowing:
        _refuse_narrowing(options)
    request = DrafterRequest(directory, target, dtype, options, target_path)
    if kind in REGISTRY.values():
        return kind.load(request)
    return _load_installed(kind, request)


def _with_lookup(
    name: str,
    target: LlamaModel,
    dtype: torch.dtype | None,
    options: DrafterOptions,
    target_path: Path | None,
) -> Drafter:
    """A trained drafter and prompt lookup beside it."""
    from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
    from specrt.draft.with_lookup import RatedDrafter, WithLookup

    if target.device.is_gpu:
        raise ValueError(f"drafter: {name!r}: prompt lookup beside a drafter runs on the CPU alone")
    check_name(name)
    own, _ = without_lookup(name)
    trained = load_drafter(own, target, dtype, options, target_path)
    if not isinstance(trained, RatedDrafter):
        raise ValueError(f"drafter: {_BESIDE}, got {own!r}")
    return WithLookup(trained, PromptLookupDrafter())


def check_drafter(drafter: object, origin: str) -> None:
    """Whether an object can be asked for drafts.

    Raises:
        TypeError: it lacks something; says what, and of which ``origin``.
    """
    if isinstance(drafter, type):
        raise TypeError(f"{origin}: expected a drafter, got the class {drafter.__name__} of some")
    lacking = [name for name in _METHODS if not callable(getattr(drafter, name, None))]
    if lacking or not isinstance(getattr(drafter, "taps", None), tuple):
        raise TypeError(
            f"{origin}: expected an object with the methods of specrt.draft.base.Drafter, got "
            f"{type(drafter).__name__} without {', '.join(lacking or ['taps, a tuple of names'])}"
        )


def _find(
    name: str | os.PathLike[str], target: ModelConfig, target_path: Path | None
) -> tuple[Kind, Path | None]:
    """The kind of what is named, and its checkpoint."""
    if isinstance(name, str):
        check_name(name)
        if name in (kind.name for kind in named_kinds()):
            return REGISTRY[name], None
        if name in _foreign_names():
            return _installed_kind(name), None
    directory = drafter_directory(name, target, target_path)
    _refuse_several(directory)
    said = _said_kind(directory)
    if said is not None:
        return _installed_kind(said), directory
    *ours, last = (kind for kind in REGISTRY.values() if kind.matches is not None)
    for kind in chain(ours, _installed_kinds()):
        if kind.matches is not None and kind.matches(directory):
            return kind, directory
    return last, directory


def _said_kind(directory: Path) -> str | None:
    """The installed kind that a checkpoint's ``config.json`` names, as ours do, under "drafter"."""
    from specrt.config import read_json

    file = directory / "config.json"
    said = read_json(file).get("drafter") if file.is_file() else None
    return said if isinstance(said, str) and said in _foreign_names() else None


def _refuse_several(directory: Path) -> None:
    """Say so where training left several exits to choose from."""
    from specrt.types import CheckpointError

    inner = [file.parent.name for file in sorted(directory.glob("exit-*/config.json"))]
    if inner and not (directory / "config.json").exists():
        raise CheckpointError(
            f"{directory}: has several drafters, expected one of them: {', '.join(inner)}"
        )


def _refuse_control(options: DrafterOptions) -> None:
    if options.control is not None:
        raise ValueError(
            f"controller: only trained drafters take one (EESD, FSPAD, EAGLE), got "
            f"{options.control.kind!r}"
        )


def _refuse_narrowing(options: DrafterOptions) -> None:
    narrowing = {
        "draft_weights": options.weights,
        "hot_tokens": options.hot_tokens,
        "draft_window": options.window,
    }
    for name, value in narrowing.items():
        if value is not None:
            raise ValueError(f"{name}: only FSPAD and EAGLE drafters take it")


# --- what other packages bring ----------------------------------------------------------------


def _foreign_names() -> list[str]:
    """Names of entry points; what is ours stays ours, names that end in :data:`WITH_LOOKUP` too."""
    ours = {NONE, AUTO, *REGISTRY, *bundled_names()}
    installed = set(_installed())
    taken = {name for name in installed if name in ours or name.endswith(WITH_LOOKUP)}
    for name in sorted(taken):
        logging.getLogger("specrt").warning(
            "drafter: the name of the entry point %r is specrt's own; it is passed over", name
        )
    return sorted(installed - taken)


def _installed() -> dict[str, list[EntryPoint]]:
    """Entry points by name; nothing of them is imported."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name, []).append(point)
    return found


def _installed_kinds() -> Iterator[Kind]:
    """Those that can be imported; a broken one is in nobody's way who has not asked for it."""
    for name in _foreign_names():
        try:
            yield _installed_kind(name)
        except ValueError as error:
            logging.getLogger("specrt").info("%s", error)


def _installed_kind(name: str) -> Kind:
    """Import what an entry point names.

    Raises:
        ValueError: it is broken, or there are several of that name.
    """
    points = _installed()[name]
    if len(points) > 1:
        raise ValueError(
            f"drafter: {name!r} is brought by several packages, expected one: "
            f"{', '.join(point.value for point in points)}"
        )
    try:
        given = points[0].load()
    except Exception as error:
        raise _broken(name, points[0], f"{type(error).__name__}: {error}") from error
    if isinstance(given, Kind):
        return replace(given, name=name)
    if not callable(given):
        expected = "expected a Kind or a callable that takes a DrafterRequest"
        raise _broken(name, points[0], f"{expected}, got {type(given).__name__}")
    return Kind(name, f"of {points[0].module}", given)


def _load_installed(kind: Kind, request: DrafterRequest) -> Drafter:
    """Make an installed kind's drafter; what is wrong with the kind is said in one line."""
    point = _installed()[kind.name][0]
    if kind.matches is not None and request.directory is None:
        raise ValueError(f"drafter: {kind.name!r} needs a checkpoint: expected its directory")
    try:
        drafter = kind.load(request)
        check_drafter(drafter, "its drafter")
    except _TOLD:
        raise
    except Exception as error:
        raise _broken(kind.name, point, f"{type(error).__name__}: {error}") from error
    return drafter


def _broken(name: str, point: EntryPoint, what: str) -> ValueError:
    package = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    return ValueError(
        f"drafter: {name!r} ({point.value}, an entry point{package}) cannot be used: {what}"
    )
