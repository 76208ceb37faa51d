"""One typed wrapper per kernel; the only modules that import ``specrt._C``.

Every op writes into preallocated tensors, so that a captured graph can run it again, and keeps a
fixed reduction order per row: a row's bits never depend on the other rows.
"""

from specrt.ops.activate import activate
from specrt.ops.draft_control import DraftDecision, draft_control, draft_control_update
from specrt.ops.draft_pairs import draft_pairs
from specrt.ops.embed import EmbedPositions, embed
from specrt.ops.feature_sample import feature_sample, feature_sample_workspace
from specrt.ops.history_append import Ending, ReportWord, history_append
from specrt.ops.history_tail import history_tail
from specrt.ops.kv_commit import kv_commit
from specrt.ops.layer_norm import layer_norm
from specrt.ops.linear import (
    DraftMaxima,
    GatheredRows,
    LinearPlan,
    TileMaxima,
    linear,
    linear_workspace,
    row_scratch,
)
from specrt.ops.matrix import Float8Matrix, Matrix, MatrixKind, PackedMatrix, StackedMatrix
from specrt.ops.matrix_pack import matrix_pack, pack_matrix
from specrt.ops.prompt_lookup import prompt_lookup
from specrt.ops.rms_norm import rms_norm
from specrt.ops.rope_append import rope_append
from specrt.ops.scale_add import scale_add
from specrt.ops.time_stamp import time_stamp
from specrt.ops.token_recycle import recycle_learn, recycle_learn_workspace, recycle_propose
from specrt.ops.tree_accept import Purpose, gumbel_noise, tree_accept
from specrt.ops.tree_attention import (
    Append,
    AttentionPlan,
    tree_attention,
    tree_attention_workspace,
)
from specrt.ops.tree_build import tree_expand, tree_rerank
from specrt.ops.tree_settle import tree_settle

__all__ = [
    "Append",
    "AttentionPlan",
    "DraftDecision",
    "DraftMaxima",
    "EmbedPositions",
    "Ending",
    "Float8Matrix",
    "GatheredRows",
    "LinearPlan",
    "Matrix",
    "MatrixKind",
    "PackedMatrix",
    "Purpose",
    "ReportWord",
    "StackedMatrix",
    "TileMaxima",
    "activate",
    "draft_control",
    "draft_control_update",
    "draft_pairs",
    "embed",
    "feature_sample",
    "feature_sample_workspace",
    "gumbel_noise",
    "history_append",
    "history_tail",
    "kv_commit",
    "layer_norm",
    "linear",
    "linear_workspace",
    "matrix_pack",
    "pack_matrix",
    "prompt_lookup",
    "recycle_learn",
    "recycle_learn_workspace",
    "recycle_propose",
    "rms_norm",
    "rope_append",
    "row_scratch",
    "scale_add",
    "time_stamp",
    "tree_accept",
    "tree_attention",
    "tree_attention_workspace",
    "tree_expand",
    "tree_rerank",
    "tree_settle",
]
