"""What comes of every family's configuration: ``python -m tests.families [--write FILE]``.

Small random models of transformers' own classes, saved by them, read by specrt: logits of a text,
40 greedy tokens, and the same tokens by speculation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from specrt.cache import CacheBatch
from specrt.config import ModelConfig
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from specrt.tree import chain_tree
from specrt.types import CheckpointError
from tests.engine.support import RandomTreeDrafter, make_engine, make_model
from tests.family_cases import CASES, Case, sizes_of

PROMPT = [(11 * i * i + 3 * i) % 97 for i in range(17)] + [5, 9, 31, 7] * 3
GREEDY = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)
TOLERANCE = 2e-5
"""Of the largest logit: float32 sums in another order."""


@dataclass(frozen=True)
class Outcome:
    """What came of one configuration."""

    state: str
    """``equal``, ``differs`` or ``refused``."""
    reason: str = ""
    """Why it is refused."""
    error: float = 0.0
    scale: float = 0.0
    """The largest logit."""
    num_agreed: int = 0
    """Of 40 greedy tokens, before the first that is another."""


def configuration(case: Case) -> PreTrainedConfig:
    """The case's configuration: small where it is run, its class' defaults where it is refused."""
    make = CONFIG_MAPPING[case.model_type]
    if not case.is_run:
        return make()
    fields = set(make().to_dict())
    sizes = sizes_of(fields, dict(make.attribute_map))
    return make(**{**sizes, **case.changes})


def refusal(case: Case) -> str | None:
    """Why specrt does not run a case's configuration, or None where it would."""
    data = json.loads(json.dumps(configuration(case).to_dict()))
    try:
        ModelConfig.from_dict(data)
    except CheckpointError as error:
        return str(error).removeprefix("config.json: ")
    return None


def build(case: Case, path: Path) -> PreTrainedModel:
    """Write a random model of a case, and return it. Norms and biases are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(case), attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.15 * noise)
    model = model.float().eval()
    model.save_pretrained(path)
    return model


def their_logits(theirs: PreTrainedModel, text: list[int]) -> torch.Tensor:
    """``[tokens, V]``, by one pass without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = theirs(torch.tensor([text]), use_cache=False).logits[0]
    return logits


def our_logits(model: LlamaModel, text: list[int], start: int) -> torch.Tensor:
    """Of the tokens from ``start`` on ``[tokens, V]``, as one chain behind a prompt."""
    cache = model.new_cache()
    sequence = cache.open(len(text) + 64)
    batch = CacheBatch(cache, [sequence])
    for _ in model.extend(text[:start], batch):
        pass
    chain = chain_tree(torch.tensor([text[start:]], dtype=torch.int32))
    return model.forward(chain, batch).logits[0].clone()


def compare(theirs: PreTrainedModel, model: LlamaModel) -> tuple[Outcome, list[int]]:
    """Logits and greedy tokens of both; and ours."""
    tokens = make_engine(model).generate(PROMPT, GREEDY).token_ids
    text = [*PROMPT, *tokens]
    expected = their_logits(theirs, text)
    got = our_logits(model, text, len(PROMPT))
    scale = float(expected.abs().max())
    error = float((got - expected[len(PROMPT) :]).abs().max())
    # Their greedy text is ours as long as each of our tokens is the best behind those before it.
    best = expected[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    agreed = next((i for i in range(len(tokens)) if tokens[i] != best[i]), len(tokens))
    is_equal = error <= TOLERANCE * scale and agreed == len(tokens)
    return Outcome("equal" if is_equal else "differs", "", error, scale, agreed), tokens


def speculated(model: LlamaModel, tokens: list[int]) -> dict[str, list[int]]:
    """The greedy text by prompt lookup, and by a drafter of random trees that is right at times."""
    garbage = RandomTreeDrafter({tuple(PROMPT): tokens}, 97, 24, hit_rate=0.5, seed=3)
    drafters = {"prompt lookup": PromptLookupDrafter(), "random trees": garbage}
    return {
        name: make_engine(model, drafter).generate(PROMPT, GREEDY).token_ids
        for name, drafter in drafters.items()
    }


def outcome(case: Case) -> Outcome:
    """Build a case and compare it."""
    reason = refusal(case)
    if reason is not None:
        return Outcome("refused", reason.split(" (supported:")[0].split("it has ")[-1])
    with tempfile.TemporaryDirectory() as folder:
        theirs = build(case, Path(folder))
        return compare(theirs, make_model(Path(folder)))[0]


def table(cases: tuple[Case, ...] = CASES) -> str:
    """The cases and what came of them, in Markdown."""
    lines = ["| configuration | model_type | outcome | largest error / logit | greedy |"]
    lines += ["|---|---|---|---|---|"]
    for case in cases:
        came = outcome(case)
        figures: list[Any] = ["", ""]
        if came.state != "refused":
            figures = [f"{came.error:.1e} / {came.scale:.1f}", f"{came.num_agreed} of 40"]
        said = came.state + (f": {came.reason}" if came.reason else "")
        lines.append(" | ".join(["| " + case.label, case.model_type, said, *figures]) + " |")
    return "\n".join(lines) + "\n"


_HEAD = """# Families

Small random models of each family, made and saved by `transformers` with what is special about
the family switched on (windows shorter than the text, caps, partial rotary embedding, biases and
norms that are not their defaults), read by specrt in float32 on a CPU: the logits of 40 positions
against those of `transformers` (eager attention), and 40 greedy tokens. `equal` is an error of at
most 2e-5 of the largest logit, and every token; `tests/models/test_families.py` holds them to it,
and speculation to plain decoding. Written by `python -m tests.families --write docs/families.md`.

A family is an entry of `specrt/config/families/` and, if its tensors have names of their own, one
of `specrt/models/families.py`.

"""


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the file to write, in place of printing")
    args = parser.parse_args()
    text = _HEAD + table()
    if args.write is None:
        print(text)
    else:
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
