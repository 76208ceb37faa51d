"""``specrt demo --device cuda``: our systems in launched rounds, on a GPU or a simulated one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from specrt.cli import demo
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.engine.launched import LaunchedRounds
from specrt.lab import measure
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from tests.checkpoints import make_draft_checkpoint
from tests.drafters.fspad_rig import make_drafter as make_fspad
from tests.engine.exits import make_exit_pair
from tests.engine.exits import make_launched_drafter as make_eesd
from tests.engine.support import make_engine


@pytest.mark.parametrize("name", ["fspad", pytest.param("eesd", marks=pytest.mark.slow)])
def test_demo(
    name: str,
    gpu: Device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, exit_layer = make_exit_pair(tmp_path, head_dim=64, dtype=torch.bfloat16)
    config = ModelConfig.from_directory(target)
    weights = place_weights(load_weights(target, config, torch.bfloat16), gpu)
    model = LlamaModel(config, weights, gpu)
    if name == "fspad":
        make_draft_checkpoint(target, tmp_path / name)
        engine = make_engine(model, make_fspad(model, tmp_path / name))
    else:
        engine = make_engine(model, make_eesd(model, exit_layer, "fixed", draft_len=2))
    if gpu.place.type != "cuda":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: f"{place}'s GPU")
    gpu_name = torch.cuda.get_device_name(gpu.place)
    # A run is as good as five, where a kernel takes a thousand times its time.
    monkeypatch.setattr(measure, "compare", partial(measure.compare, repeats=1, warmup=0))
    launched, launch = [], LaunchedRounds.launch

    def counted(self: LaunchedRounds, planned: object, *rest: object) -> object:
        launched.append(planned)
        return launch(self, planned, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LaunchedRounds, "launch", counted)
    demo.run(engine, name, "a b a b", SamplingParams(max_new_tokens=3, ignore_eos=True))
    out = capsys.readouterr().out
    assert "equal: 3 of 3 tokens" in out and gpu_name in out and "thread" not in out
    assert any(planned.is_drafted for planned in launched)


def test_runs_that_warm_a_gpu(gpu: Device) -> None:
    """What is new in a run is captured in the next, and so is not new in the third."""
    assert measure.warmups(gpu) == 3 and measure.warmups(Device()) == 1
