"""How tokens are chosen: a request's parameters, and the rows of them that kernels read."""

from specrt.sampling.params import MODEL_FIELDS, SamplingOptions, SamplingParams, one_each
from specrt.sampling.rows import SamplingRows, SamplingTable, sampling_row

__all__ = [
    "MODEL_FIELDS",
    "SamplingOptions",
    "SamplingParams",
    "SamplingRows",
    "SamplingTable",
    "one_each",
    "sampling_row",
]
