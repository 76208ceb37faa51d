"""The tokenizer of a GGUF file, made from its metadata.

``transformers`` has such a reader too. It takes a pre-tokenizer that it has no rule for to be
GPT-2's, and ten seconds for a vocabulary of 49152.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specrt.config.gguf_header import GgufHeader
from specrt.config.values import flag
from specrt.models.tokenizer import Tokenizer
from specrt.types import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


@dataclass(frozen=True)
class _Rule:
    """How text is cut before pairs of bytes are merged."""

    pattern: str | None
    """None: GPT-2's."""
    has_single_digits: bool = False
    """Whether digits are cut off one by one first."""
    is_composed: bool = False
    """Whether text is brought into Unicode's composed form (NFC)."""
    adds_bos: bool = False
    """Where the file does not say."""
    takes_whole_words: bool = False
    """Whether a word that is a token needs no merges."""


_LLAMA3 = _Rule(
    rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", adds_bos=True, takes_whole_words=True
)
_QWEN2 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES: Mapping[str, _Rule] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Rule(_QWEN2, is_composed=True),
    "deepseek-r1-qwen": _Rule(_QWEN2),
    "smollm": _Rule(None, has_single_digits=True),
    "tekken": _Rule(_TEKKEN, adds_bos=True, takes_whole_words=True),
    "gpt-2": _Rule(None),
}
"""By ``tokenizer.ggml.pre``."""


def gguf_tokenizer(header: GgufHeader) -> Tokenizer:
    """The tokenizer and chat template of a GGUF file.

    Raises:
        CheckpointError: there is none, it is of a kind that is not read, or its parts do not fit
            each other; the message names the key.
    """
    return _Reader(header).tokenizer()


class _Reader:
    """Takes the tokenizer's metadata apart, naming the file and the key in every refusal."""

    def __init__(self, header: GgufHeader) -> None:
        self._metadata = header.metadata
        self._source = str(header.file)
        self._tokens: list[str] = self._list("tokens", str)
        self._kinds: list[int] = self._of_each_token(
            "token_type", int, [_NORMAL] * len(self._tokens)
        )

    def tokenizer(self) -> Tokenizer:
        makers: Mapping[str, Callable[[], tuple[FastTokenizer, bool]]] = {
            "gpt2": self._byte_level,
            "llama": self._sentencepiece,
        }
        model = self._get("model")
        if model not in makers:
            raise self._fail(
                f"tokenizer.ggml.model: {model!r} is not supported (supported: {', '.join(makers)})"
            )
        try:
            fast, adds_bos = makers[model]()
            self._add_special_tokens(fast)
            self._add_ends(fast, adds_bos)
            return Tokenizer(self._wrapped(fast), vocab_size=len(self._tokens))
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise self._fail(f"the tokenizer cannot be made: {reason}") from error

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._source}: {message}")

    def _get(self, name: str) -> Any:
        key = f"tokenizer.ggml.{name}"
        if key not in self._metadata:
            raise self._fail(f"missing key {key}")
        return self._metadata[key]

    def _list(self, name: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        if default is not None and f"tokenizer.ggml.{name}" not in self._metadata:
            return default
        values = self._get(name)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise self._fail(f"tokenizer.ggml.{name}: expected a list of {kind.__name__}")
        return values

    def _of_each_token(self, name: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        values = self._list(name, kind, default)
        if len(values) != len(self._tokens):
            raise self._fail(
                f"tokenizer.ggml.{name}: expected {len(self._tokens)}, as many as "
                f"tokenizer.ggml.tokens, got {len(values)}"
            )
        return values

    def _flag(self, name: str, default: bool) -> bool:
        key = f"tokenizer.ggml.{name}"
        return flag(self._metadata.get(key, default), key, self._source)

    def _vocabulary(self) -> dict[str, int]:
        """Ids of tokens, the first of a text; what is unused or empty is no token."""
        vocabulary: dict[str, int] = {}
        for number, (token, kind) in enumerate(zip(self._tokens, self._kinds, strict=True)):
            if token and kind != _UNUSED:
                vocabulary.setdefault(token, number)
        return vocabulary

    def _byte_level(self) -> tuple[FastTokenizer, bool]:
        """Pairs of bytes, merged in the order of a list."""
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers import decoders, models, normalizers

        name = self._metadata.get("tokenizer.ggml.pre")
        rule = _RULES.get(name) if isinstance(name, str) else None
        if rule is None:
            said = "missing" if name is None else f"{name!r} is not supported"
            raise self._fail(f"tokenizer.ggml.pre: {said} (supported: {', '.join(_RULES)})")
        merges = [tuple(merge.split(" ")) for merge in self._list("merges", str)]
        if any(len(merge) != 2 for merge in merges):
            raise self._fail("tokenizer.ggml.merges: expected two tokens and a space between")
        model = models.BPE(self._vocabulary(), merges, ignore_merges=rule.takes_whole_words)
        fast = FastTokenizer(model)
        if rule.is_composed:
            fast.normalizer = normalizers.NFC()
        fast.pre_tokenizer = _cutting(rule)
        fast.decoder = decoders.ByteLevel()
        return fast, rule.adds_bos

    def _sentencepiece(self) -> tuple[FastTokenizer, bool]:
        """SentencePiece's BPE: characters, merged by the score of what they make."""
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers import decoders, models, normalizers

        vocabulary = self._vocabulary()
        merges = _merges(vocabulary, self._of_each_token("scores", float), self._kinds)
        unknown = self._tokens[self._kinds.index(_UNKNOWN)] if _UNKNOWN in self._kinds else None
        fast = FastTokenizer(
            models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        has_prefix = self._flag("add_space_prefix", True)
        prefix = [normalizers.Prepend("▁")] if has_prefix else []
        fast.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        strip = [decoders.Strip(" ", left=1)] if has_prefix else []
        fast.decoder = decoders.Sequence([*spaces, *strip])
        return fast, True

    def _add_special_tokens(self, fast: FastTokenizer) -> None:
        """Tokens that are found in a text before anything else is done with it."""
        from tokenizers import AddedToken

        named = {
            kinds: [
                AddedToken(token, normalized=False, special=kinds != (_USER_DEFINED,))
                for token, kind in zip(self._tokens, self._kinds, strict=True)
                if kind in kinds and token
            ]
            for kinds in ((_UNKNOWN, _CONTROL), (_USER_DEFINED,))
        }
        fast.add_special_tokens(named[_UNKNOWN, _CONTROL])
        fast.add_tokens(named[(_USER_DEFINED,)])

    def _add_ends(self, fast: FastTokenizer, adds_bos: bool) -> None:
        """Have bos and eos put around a text where the file says so."""
        from tokenizers import processors

        wanted = {
            "bos": self._flag("add_bos_token", adds_bos),
            "eos": self._flag("add_eos_token", False),
        }
        tokens = {name: self._named_token(name) for name, is_wanted in wanted.items() if is_wanted}
        ends = {name: token for name, token in tokens.items() if token is not None}
        if ends:
            parts = [ends.get("bos"), "$A", ends.get("eos")]
            fast.post_processor = processors.TemplateProcessing(
                single=[part for part in parts if part],
                pair=["$A", "$B:1"],
                special_tokens=[(token, fast.token_to_id(token)) for token in {*ends.values()}],
            )

    def _named_token(self, name: str) -> str | None:
        """The text of the token that the file names so."""
        key = f"tokenizer.ggml.{name}_token_id"
        number = self._metadata.get(key)
        if number is None:
            return None
        if type(number) is not int or not 0 <= number < len(self._tokens):
            raise self._fail(f"{key}: expected a token below {len(self._tokens)}, got {number!r}")
        return self._tokens[number]

    def _wrapped(self, fast: FastTokenizer) -> Any:
        from transformers import PreTrainedTokenizerFast

        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        named = {f"{ours}_token": self._named_token(name) for ours, name in names.items()}
        template = self._metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise self._fail("tokenizer.chat_template: expected a text")
        return PreTrainedTokenizerFast(
            tokenizer_object=fast,
            chat_template=template,
            clean_up_tokenization_spaces=False,
            **{name: token for name, token in named.items() if token is not None},
        )


def _cutting(rule: _Rule) -> Any:
    from tokenizers import Regex, pre_tokenizers

    parts: list[Any] = []
    if rule.has_single_digits:
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.pattern is not None:
        parts.append(pre_tokenizers.Split(Regex(rule.pattern), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None))
    return pre_tokenizers.Sequence(parts)


def _merges(
    vocabulary: Mapping[str, int], scores: list[float], kinds: list[int]
) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the best scores first."""
    found = [
        (-scores[number], -cut, token[:cut], token[cut:])
        for token, number in vocabulary.items()
        if kinds[number] == _NORMAL
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]
