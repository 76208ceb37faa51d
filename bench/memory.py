"""Peak memory of one contender, measured in a process of its own.

usage: python -m bench.memory '<JSON of a Probe>'; prints bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.contenders import LLAMA_CPP, Contender, LlamaCpp, Ours, Request, Transformers
from specrt.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Probe:
    """A contender and what it is to do, in terms that another process understands."""

    kind: str
    """``ours``, ``transformers`` or ``llama.cpp``."""
    path: str
    dtype: str
    threads: int
    drafter: str | None
    lookup: int | None
    prompt_ids: list[int]
    max_new_tokens: int
    stop_ids: list[int]

    def make(self) -> Contender:
        """Load the contender."""
        if self.kind == LLAMA_CPP:
            return LlamaCpp(
                Path(self.path),
                self.dtype,
                threads=self.threads,
                context=len(self.prompt_ids) + self.max_new_tokens,
                stop_ids=self.stop_ids,
            )
        if self.kind == "ours":
            return Ours(self.path, self.drafter, self.dtype)
        return Transformers(Path(self.path), self.dtype, self.lookup)


def peak_growth(probe: Probe) -> int | None:
    """Bytes by which loading and generating raise the peak over that of the imports.

    None where there is no /proc.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "bench.memory", json.dumps(asdict(probe))]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"memory probe failed: {done.stderr.strip()[-2000:]}")
    return int(done.stdout.split()[-1])


def import_all(kind: str) -> None:
    """What a contender imports late (transformers, 90 MB of it), so that only data counts."""
    from transformers import AutoModelForCausalLM

    modules: list[object] = [AutoModelForCausalLM]
    if kind == "transformers":
        from transformers.models.llama import modeling_llama

        modules.append(modeling_llama)
    elif kind == LLAMA_CPP:
        import llama_cpp

        modules.append(llama_cpp)
    else:
        with tempfile.TemporaryDirectory() as directory:
            _load_empty_tokenizer(Path(directory))
    # Starts the thread pools.
    torch.randn(512, 512) @ torch.randn(512, 512)


def _load_empty_tokenizer(directory: Path) -> None:
    """Loading any tokenizer imports what loading tokenizers imports."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "config.json": {"model_type": "llama"},
    }
    for name, content in settings.items():
        (directory / name).write_text(json.dumps(content))
    load_tokenizer(directory)


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    """Run the probe given as the argument."""
    probe = Probe(**json.loads(sys.argv[1]))
    torch.set_num_threads(probe.threads)
    import_all(probe.kind)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    probe.make().run(Request(probe.prompt_ids, probe.max_new_tokens, 0.0, 0))
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main()
