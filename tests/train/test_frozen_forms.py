"""The frozen target of families that are not Llama's: hidden states are transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specrt.config import ModelConfig
from specrt.train.features.frozen import PackedTarget
from tests.families import build
from tests.family_cases import CASES, VARIANTS, Case
from tests.train.feature_support import error

# Between them: each arrangement of norms, windows, caps, both kinds of rotary embedding in one
# model, learned positions, scales, partial and interleaved rotary embedding.
USUAL = {"gemma2", "gemma3_text", "olmo2", "cohere2", "gpt2", "gpt_neox", "glm4", "granite"}


def _param(case: Case) -> object:
    marks = () if case.model_type in USUAL and case in CASES else (pytest.mark.slow,)
    return pytest.param(case, id=case.label, marks=marks)


@pytest.mark.parametrize("case", [_param(case) for case in (*CASES, *VARIANTS) if case.is_run])
def test_features_are_transformers_hidden_states(case: Case, tmp_path: Path) -> None:
    theirs = build(case, tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    target = PackedTarget(tmp_path, config, torch.float32, torch.device("cpu"), taps=(1, 3))
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(3, 97, (length,), generator=generator) for length in (9, 1, 40)]
    for ids, got in zip(sequences, target.features(sequences), strict=True):
        with torch.no_grad():
            states = theirs(ids[None], output_hidden_states=True).hidden_states
        for rows, number in zip(got.chunk(3, -1), (1, 3, -1), strict=True):
            assert error(rows, states[number][0]) < 1e-5, number
