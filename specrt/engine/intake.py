"""From what users ask to requests: checked whole before anything of it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from specrt.config import ModelConfig
from specrt.draft.base import Drafter, DraftParams, ShapedDrafter
from specrt.engine.editors import Editors
from specrt.engine.limits import EngineLimits
from specrt.engine.prompts import Prompt, PromptEncoder, split_prompts
from specrt.engine.request import Request
from specrt.engine.results import StreamChunk
from specrt.engine.stop import OutputEnd, TextTracker
from specrt.models.tokenizer import Tokenizer
from specrt.pages import page_groups
from specrt.sampling import SamplingParams, one_each, sampling_row
from specrt.types import RequestHandle, SequenceState


class Asked(NamedTuple):
    """One answer to a prompt of a call."""

    number: int
    """Which prompt."""
    choice: int
    """Which of its answers."""
    ids: list[int]
    params: SamplingParams
    draft: DraftParams


@dataclass(frozen=True)
class Intake:
    """Knows what an engine can take."""

    config: ModelConfig
    tokenizer: Tokenizer
    drafter: Drafter
    limits: EngineLimits
    editors: Editors

    def encoder(self, add_special_tokens: bool) -> PromptEncoder:
        """Makes token ids of prompts."""
        return PromptEncoder(self.tokenizer, self.config.vocab_size, add_special_tokens)

    def take(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        draft: DraftParams | None,
        options: Mapping[str, object],
        add_special_tokens: bool,
    ) -> tuple[deque[Asked], bool]:
        """What is asked, prompt by prompt, and whether that may be many answers; all of it can be
        given.

        Raises:
            ValueError, TypeError: as :meth:`specrt.engine.engine.Engine.generate`.
        """
        self.check_draft(draft)
        batch, many = split_prompts(prompts)
        params = one_each(sampling, len(batch), options)
        defaults, vocab = self.config.generation, self.config.vocab_size
        encoder = self.encoder(add_special_tokens)
        asked = deque[Asked]()
        for index, (prompt, p) in enumerate(zip(batch, params, strict=True)):
            name = f"prompts[{index}]" if many else "prompt"
            ids, p = encoder.encode(prompt, name), p.with_defaults(defaults)
            self._check_room(name, len(ids))
            if p.logit_bias and max(p.logit_bias) >= vocab:
                raise ValueError(
                    f"logit_bias, suppress_tokens: expected token ids < {vocab}, "
                    f"got {max(p.logit_bias)}"
                )
            p = self.editors.checked(p)
            for choice, one in enumerate(p.choices()):
                asked.append(Asked(index, choice, ids, one, draft or DraftParams()))
        return asked, many or len(asked) > 1

    def check_draft(self, draft: DraftParams | None) -> None:
        """Refuse a shape that the engine or the drafter does not take.

        Raises:
            ValueError: so; names the field.
        """
        if draft is None:
            return
        most = self.limits.max_nodes
        if (draft.total_tokens or 1) > most:
            raise ValueError(
                f"total_tokens: expected at most the engine's max_nodes, {most}, "
                f"got {draft.total_tokens}"
            )
        if isinstance(self.drafter, ShapedDrafter):
            self.drafter.check(draft)

    def _check_room(self, name: str, num_tokens: int) -> None:
        context, cached = self.config.max_positions, self.limits.max_cached_tokens
        if num_tokens >= context:
            raise ValueError(
                f"{name}: {num_tokens} tokens leave no room in the context of {context}"
            )
        if cached is not None and self._num_seen(num_tokens) >= cached:
            raise ValueError(
                f"{name}: {num_tokens} tokens leave no room in the engine's max_cached_tokens, "
                f"{cached}"
            )

    def _num_seen(self, num_tokens: int) -> int:
        """Of so many, those that some layer sees behind them."""
        groups = page_groups(self.config, self.config.dtype, page_size=1)
        return max(group.num_pages_at_once(num_tokens, 1) for group in groups)

    def request(
        self,
        asked: Asked,
        handle: RequestHandle,
        is_streamed: bool,
        box: MutableSequence[StreamChunk],
    ) -> Request:
        """A request of what was asked, with a seed if it had none.

        Args:
            asked: as :meth:`take` gave it.
            handle: its name.
            is_streamed: whether its text is wanted before the end.
            box: takes what comes of it.
        """
        ids, params = asked.ids, asked.params.with_seed()
        wanted = len(ids) + params.max_new_tokens
        max_len = min(wanted, self.config.max_positions)
        editor = self.editors.editor(params, ids, max_len)
        eos_ids = () if params.ignore_eos else self.config.eos_ids

        stop_ids = {**{i: i for i in params.stop_token_ids or ()}, **dict.fromkeys(eos_ids)}

        def new_end() -> OutputEnd:
            return OutputEnd(
                self._tracker(params, ids),
                stop_ids=stop_ids,
                stop_strings=params.stop_strings,
                special_tokens=self.tokenizer.special_tokens,
                keeps_stop=params.include_stop_str_in_output,
                num_left=max_len - len(ids),
                num_sure=params.min_new_tokens,
                limit_reason="length" if max_len == wanted else "context",
                is_streamed=is_streamed,
            )

        state = SequenceState(
            list(ids),
            len(ids),
            max_len,
            seed=params.seed or 0,
            temperature=params.temperature,
            sampling_row=sampling_row(params, len(ids)),
            cache_salt=params.cache_salt,
        )
        tell, place = box.append, (asked.number, asked.choice)
        return Request(handle, params, asked.draft, state, new_end, tell, *place, editor)

    def _tracker(self, params: SamplingParams, prompt: Sequence[int]) -> TextTracker:
        special, decode = self.tokenizer.special_tokens, self.tokenizer.decode
        if params.skip_special_tokens:
            return TextTracker(decode, prompt, special)
        # Ids of a padded vocabulary are no tokens, and have no text.
        unused = {token: text for token, text in special.items() if not text}
        return TextTracker(partial(decode, skip_special_tokens=False), prompt, unused)
