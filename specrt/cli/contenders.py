"""Several drafters named on the command line, for one target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from specrt.cli.answers import digest
from specrt.cli.engine_options import drafter_name, target_directory
from specrt.draft.kinds import AUTO, bundled_for, check_name, default_drafter, named_kinds

if TYPE_CHECKING:
    from specrt.config import ModelConfig
    from specrt.engine.engine import Engine

ALL = "all"


def name_drafters(given: str, target: ModelConfig, *, is_gpu: bool = False) -> dict[str, str]:
    """What drafters are asked for, as :func:`specrt.draft.kinds.load_drafter` takes them, by what
    tables call them.

    Args:
        given: names and directories with commas between, each as it is or behind ``NAME=``.
            ``"all"`` stands for those that need no checkpoint and those bundled for the target,
            but for what is named besides.
        target: the model they are for.
        is_gpu: where they shall run.

    Raises:
        CheckpointError: one is neither a name nor a directory.
        ValueError: a name comes twice, or is plain decoding's.
    """
    from specrt.lab.measure import PLAIN

    items = [item.strip() for item in given.split(",")]
    explicit: dict[str, str] = {}
    for item in items:
        if item == ALL:
            continue
        shown, drafter = _parse(item, target, is_gpu)
        check_name(drafter)
        if shown in explicit:
            raise ValueError(f"drafters: {shown} comes twice; NAME=DIR gives one another name")
        if shown == PLAIN:
            raise ValueError(f"drafters: {PLAIN} is what plain decoding is called")
        explicit[shown] = drafter
    own = [kind.name for kind in named_kinds()]
    named: dict[str, str] = {}
    for item in items:
        if item != ALL:
            shown, drafter = _parse(item, target, is_gpu)
            named[shown] = drafter
            continue
        for name in (*own, *bundled_for(target)):
            if name not in explicit:
                named[name] = name
    return named


def contenders(engine: Engine, target: str, named: Mapping[str, str]) -> dict[str, Engine]:
    """Engines of one target, by their drafters' names.

    Args:
        engine: of the target; its own drafter is left aside.
        target: as named on the command line.
        named: as :func:`name_drafters` gives them.

    Raises:
        CheckpointError: one of them is none, or was made for another target.
    """
    from specrt.draft.kind import DrafterOptions
    from specrt.draft.kinds import load_drafter
    from specrt.lab.measure import with_drafter

    path, _ = target_directory(target)
    engines: dict[str, Engine] = {}
    for shown, name in named.items():
        drafter = load_drafter(name, engine.target, None, DrafterOptions(), path)
        engines[shown] = with_drafter(engine, drafter)
    return engines


def identity(drafter: str, target: ModelConfig) -> str:
    """What tells a drafter from another one of its name: its files, if it has any."""
    from specrt.draft.kinds import drafter_directory, without_lookup
    from specrt.models.opening import weights_hash
    from specrt.types import CheckpointError

    own, has_lookup = without_lookup(drafter)
    try:
        directory = drafter_directory(own, target)
        file = directory / "config.json"
        config = file.read_text(encoding="utf-8") if file.is_file() else ""
        return digest(f"{weights_hash(directory)} {config}{' with lookup' if has_lookup else ''}")
    except (CheckpointError, OSError):  # one that needs none
        return drafter


def _parse(item: str, target: ModelConfig, is_gpu: bool) -> tuple[str, str]:
    """An item's name in tables, and its drafter; directories may have ``=`` in their names."""
    name, is_named, drafter = item.partition("=")
    if not (is_named and name and "/" not in name):
        name, drafter = drafter_name(item, target, is_gpu=is_gpu), item
    drafter = drafter.strip()
    if drafter == AUTO:
        drafter = default_drafter(target, is_gpu=is_gpu)
    return name.strip(), drafter
