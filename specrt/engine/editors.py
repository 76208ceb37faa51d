"""From a request's parameters to its editor: checked whole before anything of it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from specrt.engine.editor import AllowedTokens, BadWords, Editor, LeastTokens, Mask
from specrt.engine.grammar import Grammars
from specrt.models.tokenizer import Tokenizer
from specrt.sampling import SamplingParams


class Editors:
    """Makes editors for one target.

    Args:
        tokenizer: spells words and texts.
        vocab_size: V.
        eos_ids: tokens that end a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._grammars = Grammars(tokenizer, self._eos_ids)

    def checked(self, params: SamplingParams) -> SamplingParams:
        """These parameters, with words that are one token among the biases: no host is needed for
        them.

        Raises:
            ValueError: an id is none of the vocabulary, a word has no tokens, or a form of output
                cannot be followed; names it.
        """
        most = max(params.allowed_token_ids or (), default=0)
        if most >= self._vocab_size:
            raise ValueError(
                f"allowed_token_ids: expected token ids < {self._vocab_size}, got {most}"
            )
        if params.structured is not None:
            if not self.stop_ids(params):
                raise ValueError(
                    "structured: expected a token that ends the output, got none: ignore_eos "
                    "without stop_token_ids, or a model that has none"
                )
            self._grammars.compile(params.structured)
        lone = [run[0] for run in self._spellings(params) if len(run) == 1]
        if not lone:
            return params
        banned = dict.fromkeys(lone, -math.inf)
        return replace(params, logit_bias={**(params.logit_bias or {}), **banned})

    def stop_ids(self, params: SamplingParams) -> list[int]:
        """Tokens that end the output."""
        eos_ids = () if params.ignore_eos else self._eos_ids
        wanted = {*(params.stop_token_ids or ()), *eos_ids}
        return sorted(token for token in wanted if token < self._vocab_size)

    def editor(self, params: SamplingParams, prompt: Sequence[int], max_len: int) -> Editor | None:
        """What edits a request's logits; None: nothing does.

        Args:
            params: as :meth:`checked` gave them.
            prompt: its token ids.
            max_len: that prompt and output may have.
        """
        stop_ids = self.stop_ids(params)
        masks = list[Mask]()
        if params.allowed_token_ids is not None:
            masks.append(AllowedTokens(params.allowed_token_ids, self._vocab_size))
        if params.min_new_tokens and stop_ids:
            masks.append(LeastTokens(params.min_new_tokens, stop_ids))
        spellings = [run for run in self._spellings(params) if len(run) > 1]
        if spellings:
            masks.append(BadWords(spellings))
        if params.structured is not None:
            masks.append(self._grammars.mask(params.structured, stop_ids))
        if not masks and params.logits_processor is None:
            return None
        num_left = max_len - len(prompt)
        return Editor(prompt, params.logits_processor, masks, stop_ids, num_left)

    def _spellings(self, params: SamplingParams) -> list[tuple[int, ...]]:
        """Each bad word's tokens, behind a space and not; none that ends with another.

        Raises:
            ValueError: there are none, or not of this vocabulary.
        """
        found = dict[tuple[int, ...], None]()
        for word in params.bad_words or ():
            for text in (word.lstrip(), " " + word.lstrip()):
                run = tuple(self._tokenizer.encode(text, add_special_tokens=False))
                if not run or max(run) >= self._vocab_size:
                    raise ValueError(f"bad_words: expected words of tokens, got {word!r}")
                found[run] = None
        return [run for run in found if not any(run[i:] in found for i in range(1, len(run)))]
