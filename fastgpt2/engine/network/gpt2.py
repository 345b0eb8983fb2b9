"""A GPT-2, ready to run: packed weights, a KV cache, a kernel, and the processes that run a step together."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import weakref
from collections.abc import Sequence
from typing import Any

from fastgpt2.engine.kernels.kernel import Kernel
from fastgpt2.engine.kernels.machine_code import describe_for_helpers
from fastgpt2.engine.kernels.openblas import identify_blas
from fastgpt2.engine.kernels.panels import Array
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.model.packing import PackedFile
from fastgpt2.engine.model.weights import view_weights
from fastgpt2.engine.network.arena import Arena
from fastgpt2.engine.network.helpers import WAKE_AFTER_SECONDS, HelperProcesses, TeamBroken
from fastgpt2.engine.network.kv_cache import KVCache
from fastgpt2.engine.network.step import DRAFT_WEIGHTS, OWN_WEIGHTS, Barrier, Segment, Step
from fastgpt2.engine.network.transformer import Shape, Shard, WeightSet, buffer_name, make_shards, state_specs
from fastgpt2.errors import ModelError

log = logging.getLogger("fastgpt2.engine")

# Rows of a step, beside those of sequences that decode.
DEFAULT_MAX_ROWS = 256

# Rows of prompts that there is room for in a step beside any number of sequences that decode. They are read however
# long they take, and more than these if there is time (`decoding/prompt_rows.py`).
PREFILL_ROWS_BESIDE = 64

# After an interrupted step the helpers are started anew; when they keep ending, that is given up.
MAX_STARTS = 100


class GPT2:
    """The network and the state of its sequences.

    Args:
        packed: stays mapped as long as this object lives.
        draft: another set of weights of the same model, to draft with.
        shape: how many sequences, tokens a step, and processes, this one included. The others are started by the
            first step at the latest, and join when they are ready.
        kv_memory: bytes for the keys and values of all sequences; None for what all slots can take at most.

    Attributes:
        sets: the sets of weights, by `OWN_WEIGHTS` and `DRAFT_WEIGHTS`.
        cache: the keys and values of the sequences; ask it for slots.
        size: the number of processes that it is meant to run on; `ready` tells whether all of them have joined.

    Raises:
        ModelError: the system does not give the address space for that many slots.
    """

    def __init__(
        self,
        config: GPT2Config,
        packed: PackedFile,
        kernel: Kernel,
        shape: Shape,
        kv_memory: int | None = None,
        draft: tuple[PackedFile, Kernel] | None = None,
    ) -> None:
        self.config, self.size, self.max_rows = config, shape.size, shape.max_rows
        self.sets = [
            WeightSet(file, view_weights(file.tensors, config), multiplier)
            for file, multiplier in ((packed, kernel), *([draft] if draft is not None else []))
        ]
        self._shape, self._kv_memory = shape, kv_memory
        self._starts_left, self._lost = MAX_STARTS, False
        self._set_up()
        _networks.add(self)

    def _set_up(self) -> None:
        try:
            self._arena = Arena(state_specs(self.config, self.sets, self._shape), shared=self.size > 1)
        except (OSError, ValueError, OverflowError) as reason:
            raise ModelError(
                f"no memory for {self._shape.n_slots} sequences of {self.config.n_positions} positions ({reason}); "
                "set a smaller max_batch"
            ) from None
        self.cache = KVCache(self.config, self._shape.n_slots, self._arena, self._kv_memory)
        self._alone = make_shards(self.config, self.sets, self.cache, self._arena, (0, 1), None)
        self._together: list[Shard] | None = None
        self._helpers: HelperProcesses | None = None
        self._barrier: Barrier | None = None

    @property
    def product_name(self) -> str:
        """Return the name of what multiplies: "mkl", "compiled-int8", or how numpy's BLAS calls itself."""
        name = self.sets[OWN_WEIGHTS].kernel.product.name
        return identify_blas() if name == "openblas" else name

    def describe(self) -> str:
        """Return BLAS, panels' widths and processes as text: "openblas-SkylakeX in panels of 64/32, 2 processes"."""
        block = self.sets[OWN_WEIGHTS].weights.blocks[0]
        widths = dict.fromkeys(linear.weight.width for linear in (block.c_fc, block.mlp_c_proj))
        processes = f"{self.size} process{'es' if self.size > 1 else ''}"
        drafts = f", drafts by {self.sets[DRAFT_WEIGHTS].kernel.product.name}" if self.can_draft else ""
        return f"{self.product_name} in panels of {'/'.join(map(str, widths))}, {processes}{drafts}"

    def helper_pids(self) -> list[int]:
        return [] if self._helpers is None else self._helpers.pids

    @property
    def exact(self) -> bool:
        """Tell whether a sequence's logits have the same bits alone, in any batch, and with its prompt cut anywhere."""
        return self._alone[OWN_WEIGHTS].exact

    @property
    def ready(self) -> bool:
        """Tell whether every process has joined."""
        return self._barrier.complete if self._barrier is not None else not self._wants_helpers

    @property
    def can_draft(self) -> bool:
        return len(self.sets) > 1

    def forward(self, segments: Sequence[Segment], weights: int = OWN_WEIGHTS) -> Array:
        """Run the segments' tokens, append their keys and values to the cache, and return logits.

        Args:
            segments: one a sequence; a slot must have room for its segment's tokens. Together at most `max_rows`.
            weights: `OWN_WEIGHTS`, or `DRAFT_WEIGHTS`. What these append to the cache is to be truncated.

        Returns:
            float32 [sum of n_logits, vocab_size], in the order of the segments; valid until the next call.
        """
        if self._lost:
            raise RuntimeError("the process was forked while sequences were running; load the model after forking")
        step = Step(segments, [self.cache.lengths[segment.slot] for segment in segments], weights)
        if step.rows > self.max_rows:
            raise ValueError(f"{step.rows} tokens in a step; this network takes {self.max_rows}")
        try:
            self._run(step)
        except TeamBroken as reason:
            # All state is here, and the cache's lengths are as before: the step is simply done again.
            log.warning("a helper process of the engine has ended (%s); going on in one process", reason)
            self._dismiss_helpers()
            self._alone[weights].run(step)
        except BaseException:
            # The helpers wait in the midst of a step that nobody will end.
            self._dismiss_helpers()
            raise
        for segment in segments:
            self.cache.lengths[segment.slot] += len(segment.ids)
        wanted = sum(segment.n_logits for segment in segments)
        logits: Array = self._arena[buffer_name(weights, "logits")][:wanted, : self.config.vocab_size]
        return logits

    def _run(self, step: Step) -> None:
        if self._wants_helpers:
            self.start_helpers()
        helpers, barrier = self._helpers, self._barrier
        if helpers is None or barrier is None or not barrier.complete:
            self._alone[step.weights].run(step)
            return
        if self._together is None:
            self._together = make_shards(self.config, self.sets, self.cache, self._arena, (0, self.size), barrier)
        # The helpers have been idle since this process came to the barrier last, or since a later moment.
        may_sleep = time.monotonic() - barrier.arrived_at > WAKE_AFTER_SECONDS
        barrier.begin(step)
        if may_sleep:
            helpers.wake()
        self._together[step.weights].run(step)

    def wait_until_ready(self, seconds: float = 30.0) -> bool:
        """Wait for the helpers. Return whether all have joined in time."""
        if self._wants_helpers:
            self.start_helpers()
        deadline = time.monotonic() + seconds
        while not self.ready and time.monotonic() < deadline:
            try:
                if self._helpers is not None:
                    self._helpers.check()
            except TeamBroken:
                return False
            time.sleep(0.002)
        return self.ready

    def close(self) -> None:
        """End the helpers. The network still runs, in one process."""
        self._starts_left = 0
        self._dismiss_helpers()

    @property
    def _wants_helpers(self) -> bool:
        return self.size > 1 and self._helpers is None and self._starts_left > 0

    def start_helpers(self, processes: HelperProcesses | None = None) -> None:
        """Start the other processes, or take those that have been started already; they join when they are ready."""
        self._starts_left -= 1
        try:
            processes = processes or HelperProcesses(self.size - 1)
            control = self._arena["control"]
            control[:] = 0
            barrier = Barrier(control, 0, self.size, processes.check)
            barrier.join()
            processes.send_order(self._describe_for_helpers())
        except OSError as reason:
            log.warning("no helper process can be started (%s); going on in one process", reason)
            self._starts_left = 0
        else:
            self._helpers, self._barrier = processes, barrier

    def _describe_for_helpers(self) -> dict[str, Any]:
        # Through /proc, helpers can also open what was opened after they had been started.
        files = f"/proc/{os.getpid()}/fd"
        sets = [
            {
                "weights": f"{files}/{weight_set.packed.fd}",
                "product": weight_set.kernel.product.name,
                "exact_chunks": weight_set.kernel.exact_chunks,
                "compiled": weight_set.kernel.compiled,
            }
            for weight_set in self.sets
        ]
        config, shape = dataclasses.asdict(self.config), dataclasses.asdict(self._shape)
        state = f"{files}/{self._arena.fd}"
        order = {"config": config, "state": state, "sets": sets, "shape": shape, "parent": os.getpid()}
        return {**order, "code": describe_for_helpers()}

    def _dismiss_helpers(self) -> None:
        if self._helpers is not None:
            self._helpers.stop()
        self._helpers = self._barrier = self._together = None

    def after_fork(self) -> None:
        """Leave the original's helpers, and the memory that it shares with them, alone in a forked copy."""
        if self.size == 1:
            return
        if self._helpers is not None:
            self._helpers.disown()
        usable = self.cache.usable_slots
        self._lost = self.cache.free_slots < usable
        self._set_up()
        self.cache.use_slots(usable)


def _after_fork() -> None:
    for network in list(_networks):
        network.after_fork()


_networks: weakref.WeakSet[GPT2] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
