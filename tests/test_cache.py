"""What drafters keep of the batch that ran last."""

from __future__ import annotations

from pathlib import Path

from specrt.cache import LastBatch
from tests.checkpoints import make_checkpoint
from tests.engine.support import make_model


def test_the_last_batch_is_made_anew_only_when_others_run(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    cache = make_model(tmp_path).new_cache()
    one, two = cache.open(10), cache.open(10)
    last = LastBatch(cache)
    batch = last.of([one, two])
    assert last.of([one, two]) is batch
    assert last.of([two, one]) is not batch
    batch = last.of([two])
    one.length = 3  # another sequence's rows are no news
    assert last.of([two]) is batch
    two.length = 5
    last.forget()
    assert last.of([two]).kv_len.tolist() == [5]
