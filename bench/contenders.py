"""Ways to generate the same text: ours, transformers and llama.cpp, timed alike.

All take token ids and give token ids. Time is that of decoding alone: ours without its prefill, the
others from their first token (which their prefill yields) to their last.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

import specrt
from specrt import SamplingParams, builtin
from specrt.draft.kinds import named_kinds

PLAIN = "ours plain"
TRANSFORMERS = "transformers"
TRANSFORMERS_LOOKUP = "transformers lookup"
LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on."""

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Output:
    """What came of a request."""

    token_ids: list[int]
    num_timed: int
    """Tokens that ``seconds`` of decoding gave."""
    seconds: float
    prefill_seconds: float
    num_rounds: int
    """Forward passes of the target that gave tokens; tau is tokens by rounds."""

    @property
    def rate(self) -> float | None:
        """Tokens a second; None if all came at once."""
        return self.num_timed / self.seconds if self.num_timed > 0 else None


def known_drafters(target: str) -> list[str]:
    """Drafters that need nothing but the package: untrained ones and those bundled for a target."""
    bundled = builtin.drafter_paths(target)
    return [*(kind.name for kind in named_kinds()), *bundled]


class Contender(Protocol):
    """Something that generates."""

    def run(self, request: Request) -> Output:
        """Generate until an end-of-sequence token or ``max_new_tokens``."""


class Ours:
    """This package.

    Args:
        target: a checkpoint directory or ``"builtin"``.
        drafter: as for :func:`specrt.load`.
        dtype: of weights and cache.
    """

    def __init__(self, target: str, drafter: str | None, dtype: str) -> None:
        # Each run computes its prompt, as the others do.
        self.engine = specrt.load(target, drafter, dtype=dtype, max_shared_tokens=0, progress=False)

    def run(self, request: Request) -> Output:
        """As :meth:`Contender.run`."""
        params = SamplingParams(
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
        )
        started = time.perf_counter()
        result = self.engine.generate(request.prompt_ids, params)
        seconds = time.perf_counter() - started
        if result.error is not None:
            raise RuntimeError(result.error)
        prefill = result.stats.prefill_ms / 1e3
        return Output(
            token_ids=result.token_ids,
            num_timed=len(result.token_ids),
            seconds=seconds - prefill,
            prefill_seconds=prefill,
            num_rounds=result.stats.num_rounds,
        )


class Clock:
    """A transformers streamer that notes when tokens come."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._times: list[float] = []
        self._started = time.perf_counter()

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt first, then every step's tokens."""
        self._counts.append(tokens.numel())
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""

    def output(self, token_ids: list[int]) -> Output:
        """The figures, once generation is over."""
        counts, times = self._counts[1:], self._times[1:]
        return Output(
            token_ids=token_ids,
            num_timed=sum(counts[1:]),
            seconds=times[-1] - times[0],
            prefill_seconds=times[0] - self._started,
            num_rounds=len(counts),
        )


class Transformers:
    """``transformers``' own ``generate``, with or without prompt lookup.

    Args:
        directory: a plain Hugging Face directory.
        dtype: of weights and cache.
        num_lookup_tokens: its ``prompt_lookup_num_tokens``.
        device: of the model.
        options: others of its ``generate``.
    """

    def __init__(
        self,
        directory: Path,
        dtype: str,
        num_lookup_tokens: int | None = None,
        *,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = _transformers_model(directory, dtype, device)
        self._options: dict[str, Any] = dict(options or {})
        if num_lookup_tokens is not None:
            self._options["prompt_lookup_num_tokens"] = num_lookup_tokens

    def run(self, request: Request) -> Output:
        """As :meth:`Contender.run`."""
        ids = torch.tensor([request.prompt_ids], device=self._model.device)
        options = dict(self._options)
        if request.temperature > 0:
            torch.manual_seed(request.seed)
            options |= {"do_sample": True, "temperature": request.temperature, "top_k": 0}
        else:
            options["do_sample"] = False
        clock = Clock()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            pad_token_id=0,
            streamer=clock,
            **options,
        )
        return clock.output(output[0, ids.shape[1] :].tolist())


@lru_cache(maxsize=1)
def _transformers_model(directory: Path, dtype: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), local_files_only=True
    )
    return model.eval().to(device)


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


class LlamaCpp:
    """llama.cpp through its C interface, so that no Python wrapper is timed.

    Args:
        gguf: the model file.
        dtype: float32 keeps keys and values in float32 too; else they are float16, its default.
        threads: for prompts and decoding.
        context: most tokens of prompt and output.
        stop_ids: tokens that end the output.
    """

    def __init__(
        self, gguf: Path, dtype: str, *, threads: int, context: int, stop_ids: Sequence[int]
    ) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._stop_ids = set(stop_ids)
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(gguf).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {gguf}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = context
        options.n_threads = options.n_threads_batch = threads
        options.no_perf = True
        if dtype == "float32":
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, options)

    def run(self, request: Request) -> Output:
        """As :meth:`Contender.run`."""
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        sampler = self._sampler(request)
        tokens: list[int] = []
        times = [time.perf_counter()]
        pending = request.prompt_ids
        while len(tokens) < request.max_new_tokens:
            self._decode(pending)
            tokens.append(api.llama_sampler_sample(sampler, self._context, -1))
            times.append(time.perf_counter())
            pending = tokens[-1:]
            if tokens[-1] in self._stop_ids:
                break
        api.llama_sampler_free(sampler)
        return Output(
            token_ids=tokens,
            num_timed=len(tokens) - 1,
            seconds=times[-1] - times[1],
            prefill_seconds=times[1] - times[0],
            num_rounds=len(tokens),
        )

    def _decode(self, ids: Sequence[int]) -> None:
        array = (self._api.llama_token * len(ids))(*ids)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")

    def _sampler(self, request: Request) -> Any:
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if request.temperature > 0:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(request.temperature))
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(request.seed))
        else:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
        return chain
