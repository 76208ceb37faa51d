"""Train the bundled target model: a deep, thin Llama that writes grade-school solutions.

Two commands::

    train_target.py train --data gsm8k_train.jsonl --out builtin/target --work ckpt \
        [--grow-from DIR] [--tokenizer DIR] [--max-minutes 75]
    train_target.py evaluate builtin/target --data gsm8k_train.jsonl

Storage of an export (``model.safetensors``): every 2-D weight ``w`` is kept as float8_e4m3fn
next to ``w_scale``, a float32 tensor of shape [1] holding a power of two; the weight is
``w.float() * w_scale``, exact in float32 and in bfloat16. 1-D weights are bfloat16. The head is
tied to the embedding and not stored.
``tools/export_checkpoint.py`` writes it as an ordinary Hugging Face checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
SCALE_SUFFIX = "_scale"
BOS, EOS = 0, 1
NOTE = re.compile(r"<<.*?>>")
GENERIC_KEYS = (  # what transformers writes into every config and a language model has no use for
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- 'Answer: ' + message['content'] + eos_token -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- bos_token + 'Question: ' + message['content'] + '\\n' -}}"
    "{%- else -%}"
    "{{- raise_exception('only user and assistant turns are supported') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Answer:' -}}{%- endif -%}"
)


# ------------------------------------------------------------------------------------- data


def read_problems(path: Path) -> list[str]:
    """Return the texts of the problems, question and answer, without the calculator notes."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [f"Question: {r['question']}\nAnswer: {NOTE.sub('', r['answer'])}" for r in rows]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with single digits; bos is 0 and eos is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Encode each text as bos, tokens, eos."""
    return [[BOS, *e.ids, EOS] for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def batches(
    problems: list[list[int]], batch: int, length: int, seed: int, skip: int
) -> Iterator[torch.Tensor]:
    """Yield packed batches [batch, length + 1] for ever, reshuffling the problems each epoch."""
    epoch, seen, need = 0, 0, batch * length
    while True:
        order = list(range(len(problems)))
        random.Random(f"{seed}-{epoch}").shuffle(order)
        stream = torch.tensor([t for i in order for t in problems[i]])
        for start in range(0, stream.numel() - need, need):
            seen += 1
            if seen > skip:
                yield stream[start : start + need + 1].unfold(0, length + 1, length)
        epoch += 1


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, problems: list[list[int]], group: int = 16) -> float:
    """Return the mean loss in nats per token, each problem on its own after its bos."""
    total, count = 0.0, 0
    ordered = sorted(problems, key=len)
    model.train(False)
    for start in range(0, len(ordered), group):
        rows = ordered[start : start + group]
        width = max(map(len, rows))
        ids = torch.tensor([r + [EOS] * (width - len(r)) for r in rows])
        labels = torch.tensor([r + [-100] * (width - len(r)) for r in rows])
        tokens = sum(len(r) - 1 for r in rows)
        total += float(model(input_ids=ids, labels=labels).loss) * tokens
        count += tokens
    model.train()
    return total / count


# ------------------------------------------------------------------------------------ model


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    """Make a freshly initialised model of the bundled shape."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=None,
        )
    )


def grow(model: LlamaForCausalLM, source: Path) -> None:
    """Fill ``model`` from one of half its depth, keeping the function that one computes.

    Each source layer becomes itself followed by a copy that adds nothing yet: the copy's
    output projections (``o_proj``, ``down_proj``) start at zero.
    """
    small = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    if 2 * small.config.num_hidden_layers != model.config.num_hidden_layers:
        raise SystemExit(f"{source} must have half of {model.config.num_hidden_layers} layers")
    state: dict[str, torch.Tensor] = {}
    for name, value in small.state_dict().items():
        match = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if match is None:
            state[name] = value
            continue
        layer, rest = int(match[1]), match[2]
        silent = "o_proj" in rest or "down_proj" in rest
        state[f"model.layers.{2 * layer}.{rest}"] = value
        state[f"model.layers.{2 * layer + 1}.{rest}"] = (
            torch.zeros_like(value) if silent else value.clone()
        )
    model.load_state_dict(state)


# ---------------------------------------------------------------------------------- storage


def power_of_two_scale(weight: torch.Tensor) -> float:
    """Return the least power of two that brings ``weight`` within float8's range."""
    peak = float(weight.abs().max())
    return 2.0 ** math.ceil(math.log2(peak / FLOAT8_MAX)) if peak > 0 else 1.0


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` as it will read back from an export."""
    if weight.dim() < 2:
        return weight.bfloat16().float()
    scale = power_of_two_scale(weight)
    return (weight / scale).to(FLOAT8).float() * scale


@contextmanager
def rounded_weights(model: LlamaForCausalLM) -> Iterator[None]:
    """Run with the weights rounded as stored; gradients then go straight to the masters."""
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(rounded(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])


def stored_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Return the tensors of an export: float8 matrices with scales, bfloat16 vectors."""
    tensors: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():  # yields the tied head only once
        weight = p.detach()
        if weight.dim() < 2:
            tensors[name] = weight.bfloat16()
            continue
        scale = power_of_two_scale(weight)
        tensors[name] = (weight / scale).to(FLOAT8)
        tensors[name + SCALE_SUFFIX] = torch.tensor([scale], dtype=torch.float32)
    return tensors


def write_config(model: LlamaForCausalLM, directory: Path, storage: bool) -> None:
    """Write ``config.json`` and ``generation_config.json``."""
    config: dict[str, Any] = model.config.to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    config["dtype"] = "bfloat16"
    for key in GENERIC_KEYS:
        config.pop(key, None)
    if storage:
        config["specrt_storage"] = {"format": "float8_e4m3fn", "scale_suffix": SCALE_SUFFIX}
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the float8 export, whole before it takes the place of an earlier one."""
    directory.mkdir(parents=True, exist_ok=True)
    write_config(model, directory, storage=True)
    # Every training text began with bos, so plain prompts must too.
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.post_processor = bos
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    partial = directory / "model.safetensors.partial"
    save_file(stored_tensors(model), partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(directory / "model.safetensors")


def load_export(directory: Path) -> LlamaForCausalLM:
    """Load a float8 export, or any plain checkpoint, as a float32 model."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config.pop("specrt_storage", None) is None:
        plain: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return plain
    model = LlamaForCausalLM(LlamaConfig(**{**config, "dtype": "float32"}))
    tensors = load_file(directory / "model.safetensors")
    state = {
        name: t.float() * tensors.get(name + SCALE_SUFFIX, torch.ones(1))
        for name, t in tensors.items()
        if not name.endswith(SCALE_SUFFIX)
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


# --------------------------------------------------------------------------------- training


@dataclass
class Clock:
    """How far the run is, by steps, by time spent stepping and by a wall-clock deadline."""

    max_steps: int | None
    max_seconds: float | None
    deadline: float | None
    step: int = 0
    spent: float = 0.0
    longest: float = 20.0

    def tick(self, seconds: float) -> None:
        """Count one step; one that took over ``longest`` was suspended and counts as that."""
        self.step += 1
        self.spent += min(seconds, self.longest)

    def progress(self) -> float:
        """Return the fraction of the run that is done, 0 to 1."""
        done = self.step / self.max_steps if self.max_steps else 0.0
        left = math.inf if self.max_seconds is None else self.max_seconds - self.spent
        if self.deadline is not None:
            left = min(left, self.deadline - time.time())
        if left <= 0:
            return 1.0
        return min(1.0, max(done, self.spent / (self.spent + left)))


class Run:
    """One training run: the model, its optimizer, and where it stands."""

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: Tokenizer, args: argparse.Namespace
    ) -> None:
        """Set the run up, taking up an earlier one that ``args.work`` holds."""
        deadline = datetime.fromisoformat(args.deadline).timestamp() if args.deadline else None
        seconds = None if args.max_minutes is None else 60.0 * args.max_minutes
        self.args = args
        self.model = model
        self.tokenizer = tokenizer
        self.forward: Any = torch.compile(model) if args.compile else model
        self.optimizer = self.make_optimizer()
        self.clock = Clock(args.steps, seconds, deadline)
        self.log: list[dict[str, float]] = []
        self.mean = 0.0
        if (args.work / "state.pt").exists():
            self.resume(args.work / "state.pt")

    def make_optimizer(self) -> torch.optim.AdamW:
        """Return AdamW with weight decay on the matrices alone."""
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": self.args.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.args.lr, betas=(0.9, 0.95), fused=True)

    def learning_rate(self) -> float:
        """Return the rate now: a linear warm-up times a cosine down to ``--lr-floor``."""
        wave: float = 0.5 * (1.0 + math.cos(math.pi * self.clock.progress()))
        warm = min(1.0, (self.clock.step + 1) / self.args.warmup)
        floor: float = self.args.lr_floor
        peak: float = self.args.lr
        rate: float = peak * warm * (floor + (1.0 - floor) * wave)
        return rate

    def step(self, ids: torch.Tensor) -> None:
        """Take one optimizer step on a batch [batch, length + 1]."""
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        late = self.clock.progress() >= 1.0 - self.args.round_share
        with rounded_weights(self.model) if late else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.args.precision == "bf16"):
                logits = self.forward(input_ids=ids[:, :-1], use_cache=False).logits
            flat = logits.float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        self.mean = 0.98 * self.mean + 0.02 * value if self.mean else value
        self.clock.tick(time.perf_counter() - began)

    def resume(self, path: Path) -> None:
        """Take up the run that ``save`` left at ``path``."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.clock.step, self.clock.spent = state["step"], state["spent"]
        self.log = state["log"]

    def save(self) -> None:
        """Save the state for resuming, and a usable export beside it."""
        work: Path = self.args.work
        work.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.clock.step,
            "spent": self.clock.spent,
            "log": self.log,
        }
        torch.save(state, work / "state.partial")
        (work / "state.partial").replace(work / "state.pt")
        export(self.model, self.tokenizer, work / "export")

    def status(self) -> str:
        """Return one line on where the run stands."""
        clock, tokens = self.clock, self.clock.step * self.args.batch * self.args.length
        return (
            f"{datetime.now():%H:%M:%S} step {clock.step} loss {self.mean:.4f} "
            f"lr {self.learning_rate():.2e} {clock.spent / clock.step:.2f} s/step "
            f"{tokens / 1e6:.2f} M tokens, {100 * clock.progress():.1f} %"
        )

    def fit(self, stream: Iterator[torch.Tensor], probe: list[list[int]], console: Console) -> None:
        """Train until the steps, the minutes or the deadline run out."""
        saved = time.time()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.model.train()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("training", total=1.0)
            while self.clock.progress() < 1.0:
                self.step(next(stream))
                done = self.clock.progress()
                bar.update(task, completed=done, description=f"loss {self.mean:.3f}")
                if self.clock.step % self.args.log_every == 0:
                    console.print(self.status())
                if time.time() - saved > 60.0 * self.args.save_minutes:
                    self.probe(probe, console)
                    self.save()
                    saved = time.time()
        self.save()

    def probe(self, problems: list[list[int]], console: Console) -> None:
        """Note the loss on a few held-out problems."""
        loss = held_out_loss(self.model, problems)
        self.log.append({"step": self.clock.step, "train": self.mean, "held_out": loss})
        console.print(f"step {self.clock.step}: {loss:.4f} nats/token on held-out problems")


# --------------------------------------------------------------------------------- commands


def split(texts: list[str], held_out: int) -> tuple[list[str], list[str]]:
    """Split off the last ``held_out`` problems, which are never trained on."""
    return texts[:-held_out], texts[-held_out:]


def run_train(args: argparse.Namespace, console: Console) -> None:
    """Train, export, and write ``training.json`` with the numbers for the model card."""
    torch.manual_seed(args.seed)
    train_texts, held_texts = split(read_problems(args.data), args.held_out)
    source = args.tokenizer or args.grow_from
    if source is None:
        tokenizer = train_tokenizer(train_texts, args.vocab_size)
    else:
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    args.vocab_size = tokenizer.get_vocab_size()
    problems, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_texts)
    model = build(args)
    if args.grow_from is not None:
        grow(model, args.grow_from)
    run = Run(model, tokenizer, args)
    stream = batches(problems, args.batch, args.length, args.seed, run.clock.step)
    run.fit(stream, held_out[:: max(1, len(held_out) // 64)], console)
    export(model, tokenizer, args.out)
    before = held_out_loss(model, held_out)
    with rounded_weights(model):
        after = held_out_loss(model, held_out)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": run.clock.step,
        "tokens": run.clock.step * args.batch * args.length,
        "tokens_per_epoch": sum(map(len, problems)),
        "minutes": run.clock.spent / 60.0,
        "held_out_loss_unrounded": before,
        "held_out_loss": after,
        "log": run.log,
    }
    write_json(args.work / "training.json", facts)
    console.print(f"held-out loss {before:.4f}, as stored {after:.4f} nats/token")


def run_evaluate(args: argparse.Namespace, console: Console) -> None:
    """Print the loss on the held-out problems and on as many trained ones."""
    train_texts, held_texts = split(read_problems(args.data), args.held_out)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = load_export(args.model)
    seen = held_out_loss(model, encode(tokenizer, train_texts[: args.held_out]))
    unseen = held_out_loss(model, encode(tokenizer, held_texts))
    console.print(f"first {args.held_out}: {seen:.4f}, last {args.held_out}: {unseen:.4f}")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to train and evaluate on."""
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_train.jsonl")
    parser.add_argument("--held-out", type=int, default=473, help="last problems kept apart")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled target model.")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: its choice)")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train and export")
    add_data(train)
    train.add_argument("--out", type=Path, required=True, help="folder of the final export")
    train.add_argument("--work", type=Path, required=True, help="folder of the running state")
    train.add_argument("--grow-from", type=Path, help="checkpoint of half the depth")
    train.add_argument("--tokenizer", type=Path, help="folder with a tokenizer.json to reuse")
    train.add_argument("--vocab-size", type=int, default=4096)
    train.add_argument("--layers", type=int, default=24)
    train.add_argument("--steps", type=int, help="stop after so many steps")
    train.add_argument("--max-minutes", type=float, help="stop after so long spent stepping")
    train.add_argument("--deadline", help="stop at this local time, ISO 8601")
    train.add_argument("--batch", type=int, default=8)
    train.add_argument("--length", type=int, default=256)
    train.add_argument("--lr", type=float, default=1e-3)
    train.add_argument("--lr-floor", type=float, default=0.05)
    train.add_argument("--warmup", type=int, default=50)
    train.add_argument("--weight-decay", type=float, default=0.05)
    train.add_argument("--round-share", type=float, default=0.15)
    train.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    train.add_argument("--compile", action="store_true", help="use torch.compile")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--log-every", type=int, default=20)
    train.add_argument("--save-minutes", type=float, default=8.0)
    train.set_defaults(run=run_train)
    evaluate = commands.add_parser("evaluate", help="loss on trained and held-out problems")
    evaluate.add_argument("model", type=Path)
    add_data(evaluate)
    evaluate.set_defaults(run=run_evaluate)
    args = parser.parse_args()
    if args.command == "train" and not (args.steps or args.max_minutes or args.deadline):
        parser.error("train needs --steps, --max-minutes or --deadline")
    return args


def main() -> None:
    """Run the chosen command."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.run(args, Console())


if __name__ == "__main__":
    main()
