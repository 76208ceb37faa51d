"""How tokens are chosen: a request's parameters, and the rows of them that kernels read."""

from specrt.sampling.params import (
    MODEL_FIELDS,
    LogitsProcessor,
    SamplingOptions,
    SamplingParams,
    one_each,
)
from specrt.sampling.rows import SamplingRows, SamplingTable, sampling_row
from specrt.sampling.structured import StructuredOutput

__all__ = [
    "MODEL_FIELDS",
    "LogitsProcessor",
    "SamplingOptions",
    "SamplingParams",
    "SamplingRows",
    "SamplingTable",
    "StructuredOutput",
    "one_each",
    "sampling_row",
]
