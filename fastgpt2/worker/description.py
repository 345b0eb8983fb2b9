"""What a worker says of itself in its hash in Redis, beside RQ's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastgpt2 import __version__
from fastgpt2.worker.memory import Memory

if TYPE_CHECKING:
    from fastgpt2.engine.engine import Engine
    from fastgpt2.worker.batch import Batch
    from fastgpt2.worker.figures import Figures


class Description:
    """Of one worker: what clients need to know of its model, and how it is doing.

    Args:
        restarts: how often its supervisor has started a worker in its place again.

    Attributes:
        longest_token_bytes: of the tokenizer, which takes a while to find it.
    """

    def __init__(self, engine: Engine, batch: Batch, figures: Figures, restarts: int) -> None:
        self._engine, self._batch, self._figures = engine, batch, figures
        self._memory = Memory(engine.decoder.model.helper_pids)
        self.longest_token_bytes = engine.tokenizer.longest_token_bytes
        self._lasting = {
            "fastgpt2_version": __version__,
            "model": engine.model,
            "computes_by": engine.describe(),
            "blas": engine.decoder.model.product_name,
            "weights": engine.weights,
            "drafts": engine.drafts,
            # Each a process of its own, with BLAS held to one thread.
            "threads": engine.decoder.model.size,
            "n_positions": engine.config.n_positions,
            "vocab_size": engine.config.vocab_size,
            "longest_token_bytes": self.longest_token_bytes,
            "max_batch": engine.max_batch,
            "restarts": restarts,
        }

    def fields(self) -> Mapping[str, Any]:
        """As they are now; what is not known is the empty text."""
        batch, decoder = self._batch, self._engine.decoder
        private_bytes, shared_bytes = self._memory.lately()
        tokens_per_second, batch_mean = self._figures.pace()
        return {
            **self._lasting,
            "in_flight": len(batch),
            "kv_bytes": decoder.kv_bytes_reserved,
            "kv_bytes_limit": decoder.kv_bytes_limit,
            "prefix_bytes": decoder.prefix_bytes,
            "prefix_bytes_limit": decoder.prefix_bytes_limit,
            "private_bytes": "" if private_bytes is None else private_bytes,
            "shared_bytes": "" if shared_bytes is None else shared_bytes,
            "tokens": batch.tokens,
            "steps": batch.steps,
            "step_seconds": round(batch.step_seconds, 6),
            "tokens_per_second": round(tokens_per_second, 3),
            "batch_mean": "" if batch_mean is None else round(batch_mean, 3),
        }
