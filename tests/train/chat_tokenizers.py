"""Tokenizers of a token a letter with chat templates of other families."""

from __future__ import annotations

from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specrt.models.tokenizer import Tokenizer

EOS = "<|im_end|>"
SPECIAL = ("<s>", "<|im_start|>", EOS)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3: what the assistant thought is told of its last turn only.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As those of models that call tools: the call stands behind what is said.
CALLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "({{ call.function.name }} {{ call.function.arguments | tojson }}){% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As early Vicuna: no opening, and nothing at the end that is a token of its own.
BARE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def letter_tokenizer(template: str | None, *, eos: str | None = EOS) -> Tokenizer:
    """Printable ASCII, the newline and the special tokens."""
    letters = [*SPECIAL, "\n", *map(chr, range(32, 127))]
    vocab = {letter: number for number, letter in enumerate(letters)}
    inner = Inner(models.BPE(vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token=eos,
        additional_special_tokens=["<|im_start|>", EOS],
        chat_template=template,
    )
    return Tokenizer(fast)


def spoken(tokenizer: Tokenizer, example: tuple[object, object]) -> str:
    """The text the loss counts."""
    token_ids, loss_mask = example
    return str(tokenizer.inner.decode(token_ids[loss_mask].tolist()))  # type: ignore[index]
