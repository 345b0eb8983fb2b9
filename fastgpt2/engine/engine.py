"""A model, loaded and ready: text in, text out."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

from fastgpt2.engine.decoding.lookup import MOST_DRAFTS
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.engine.machine import fair_share_of_kv_memory, hold_to_one_thread, processes_for
from fastgpt2.engine.model.config import CONFIG_FILE, GPT2Config, read_config
from fastgpt2.engine.model.hub import find_model
from fastgpt2.engine.model.tokenizer import Tokenizer
from fastgpt2.errors import BadRequest, TokenizerError

if TYPE_CHECKING:
    from fastgpt2.engine.decoding.decoder import Decoder
    from fastgpt2.engine.decoding.sequence import Sequence
    from fastgpt2.engine.network.helpers import HelperProcesses

log = logging.getLogger("fastgpt2.engine")
DEFAULT_MODEL = "gpt2"
BLAS_CHOICES = ("auto", "openblas", "mkl", "compiled")
DRAFTS_CHOICES = ("off", "auto", "int8")
WEIGHTS_CHOICES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Seconds from the start of `Engine.load` until each part was there. Tokenizer and weights load side by side."""

    mapped: float
    tokenizer: float
    loaded: float


class Options(TypedDict, total=False):
    """What `Engine.generate` takes beside the prompts; see `GenerationRequest`."""

    max_new_tokens: int | None
    stop: str | Iterable[str]
    ignore_eos: bool
    min_new_tokens: int
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool


class Engine:
    """One model in this process.

    Made by `Engine.load`. Not safe for use by several threads at once: a process has one decoder.

    Attributes:
        weights, drafts: as it was told to load them.
    """

    def __init__(
        self,
        model: str,
        decoder: Decoder,
        load_times: LoadTimes,
        weights: str = "float32",
        drafts: str | int = "off",
    ) -> None:
        self.model = model
        self.decoder = decoder
        self.load_times = load_times
        self.weights = weights
        self.drafts = drafts

    @property
    def config(self) -> GPT2Config:
        return self.decoder.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.decoder.tokenizer

    @property
    def max_batch(self) -> int:
        """How many sequences are decoded side by side at most."""
        return self.decoder.model.cache.usable_slots

    def describe(self) -> str:
        """How it computes, for the log: "openblas-SkylakeX in panels of 64/32, 2 processes"."""
        return self.decoder.model.describe()

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        threads: int | None = None,
        max_batch: int | None = None,
        kv_memory: int | None = None,
        prefix_memory: int | None = None,
        blas: str = "auto",
        weights: str = "float32",
        drafts: str | int = "auto",
    ) -> Engine:
        """Load a model: `demo`, a folder, or a hub id.

        Args:
            model: see `fastgpt2.engine.model.hub.find_model`.
            revision: of a hub repository.
            threads: cores to use, each by a process of its own (`team.py`); None for all, or one if the model is small.
                BLAS itself is held to one thread in this process and, by environment variables, in those it starts.
            max_batch: how many sequences are decoded side by side at most; None for as many as pay here, which is
                measured the first time that a large model is loaded.
            kv_memory: bytes that the keys and values of all sequences may take; None for a quarter of the memory
                that this process may use, or of its share of it among the workers of a pool.
            prefix_memory: bytes, beside these, in which keys and values of prompts are kept for others that begin
                alike; 0 to keep none, None for an eighth of `kv_memory`, or of what that comes to.
            blas: of float32 weights: openblas (what numpy brought), mkl (the extra of that name), compiled (by LLVM,
                the extra `compact`), or auto for the fastest here.
            weights: float32, as everybody computes the checkpoint; bfloat16 or int8 (the extra `compact`), a half and a
                quarter of the memory to read at every step, and other tokens than float32's here and there.
            drafts: guesses of what comes next that a step verifies (`drafting.py`); the tokens are the same. off; auto,
                looked up in the text so far, as many as pay; so many, wherever there are any; int8, as auto and made by
                int8 weights (the extra `compact`).

        Raises:
            ModelError: the model cannot be found, read or trusted; the message names the file and what is wrong.
            BadRequest: `max_batch` or `threads` is below 1, `blas` or `weights` is none that is here, `kv_memory` does
                not hold one sequence of all the model's positions, `prefix_memory`, unless 0, not one block of them,
                or `drafts` is neither a word above nor 1 to 15.
        """
        started = perf_counter()
        if max_batch is not None and max_batch < 1:
            raise BadRequest(f"max_batch must be 1 or more, not {max_batch}")
        if blas not in BLAS_CHOICES:
            raise BadRequest(f"blas must be one of {', '.join(BLAS_CHOICES)}, not {blas!r}")
        if weights not in WEIGHTS_CHOICES:
            raise BadRequest(f"weights must be one of {', '.join(WEIGHTS_CHOICES)}, not {weights!r}")
        if drafts not in DRAFTS_CHOICES and not (type(drafts) is int and 1 <= drafts <= MOST_DRAFTS):
            raise BadRequest(f"drafts must be {', '.join(DRAFTS_CHOICES)} or 1 to {MOST_DRAFTS}, not {drafts!r}")
        if drafts == "int8" == weights:
            raise BadRequest("drafts by int8 weights are of no use to int8 weights; leave out one of the two")
        if threads is not None and threads < 1:
            raise BadRequest(f"threads must be 1 or more, not {threads}")
        hold_to_one_thread()
        model = os.fspath(model)
        folder = find_model(model, revision)
        config = read_config(folder / CONFIG_FILE)
        size = processes_for(config, threads)
        # The tokenizer's parser releases the GIL, and helpers are other processes: both get ready on another core
        # beside the import of numpy and the mapping of the weights.
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as pool:
            beside = pool.submit(_load_beside, folder, size, started)
            from fastgpt2.engine.decoding.decoder import Decoder
            from fastgpt2.engine.decoding.drafter import Drafter
            from fastgpt2.engine.loading import load_network, measured_here
            from fastgpt2.engine.network.prefixes import prefixes_within
            from fastgpt2.engine.network.step_times import choose_slots, row_costs, slots_to_map

            kv_bytes = _kv_memory(config, kv_memory)
            prefixes = prefixes_within(config, prefix_memory, kv_bytes)
            network = load_network(
                folder,
                config,
                model,
                n_slots=slots_to_map(config) if max_batch is None else max_batch,
                size=size,
                blas=blas,
                weights=weights,
                kv_memory=kv_bytes,
                draft_weights="int8" if drafts == "int8" else None,
            )
            mapped = perf_counter() - started
            tokenizer, tokenizer_done, processes = beside.result()
        if processes is not None:
            network.start_helpers(processes)
        if tokenizer.vocab_size > config.vocab_size:
            raise TokenizerError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {config.vocab_size}"
            )
        calibration = measured_here(config)
        if max_batch is None:
            choose_slots(network, calibration)
        most = drafts if isinstance(drafts, int) else (0 if drafts == "off" else None)
        costs = row_costs(network, calibration, max_batch is None) if most is None else None
        decoder = Decoder(network, tokenizer, prefixes, Drafter(network, most, costs))
        return cls(model, decoder, LoadTimes(mapped, tokenizer_done, perf_counter() - started), weights, drafts)

    @overload
    def generate(self, prompts: str, **options: Unpack[Options]) -> GenerationResult: ...

    @overload
    def generate(
        self, prompts: list[str] | list[list[int]] | tuple[str, ...], **options: Unpack[Options]
    ) -> list[GenerationResult]: ...

    @overload
    def generate(self, prompts: list[int], **options: Unpack[Options]) -> GenerationResult: ...

    def generate(
        self, prompts: str | list[int] | list[str] | list[list[int]] | tuple[str, ...], **options: Unpack[Options]
    ) -> GenerationResult | list[GenerationResult]:
        """Continue a prompt, or several at once.

        Args:
            prompts: a text or a list of token ids; or a list of texts, or of lists of token ids.
            options: max_new_tokens, stop, ignore_eos, min_new_tokens, logprobs, prompt_logprobs, echo; see
                `GenerationRequest`.

        Returns:
            One result for one prompt, a list in the order of the prompts for several.

        Raises:
            BadRequest: an option or a prompt cannot be served; nothing has been generated then.
        """
        if not isinstance(prompts, str | list | tuple):
            raise BadRequest(
                f"prompts must be a string, a list of token ids or a list of such, not {type(prompts).__name__}"
            )
        stop = options.get("stop", ())
        if not isinstance(stop, str | list | tuple) and isinstance(stop, Iterable):
            options["stop"] = tuple(stop)
        alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        # What a prompt or an option is not, the request says.
        given: list[Any] = [prompts] if alone else list(prompts)
        fields: dict[str, Any] = {**options}
        results = self.run([GenerationRequest(prompt, **fields) for prompt in given])
        return results[0] if alone else results

    def run(
        self, requests: Iterable[GenerationRequest], between_steps: Callable[[], None] | None = None
    ) -> list[GenerationResult]:
        """Decode requests side by side, as many as there is room for, and return their results in order.

        `between_steps` is called after every step; what it raises ends the run, and the sequences in it are dropped.

        Raises:
            PromptTooLong: before anything is generated.
        """
        waiting = deque(enumerate([self.decoder.prepare(request) for request in requests]))
        running: dict[int, Sequence] = {}
        results: dict[int, GenerationResult] = {}
        try:
            while waiting or running:
                while waiting and self.decoder.has_room(waiting[0][1]):
                    index, prompt = waiting.popleft()
                    running[index] = self.decoder.admit(prompt)
                if not running:
                    raise RuntimeError("the decoder has no slot or memory left; is it in use elsewhere?")
                self.decoder.step()
                if between_steps is not None:
                    between_steps()
                for index in [i for i, sequence in running.items() if sequence.finished]:
                    results[index] = running.pop(index).result(self.model)
        finally:
            for sequence in running.values():
                self.decoder.finish(sequence)
        return [results[index] for index in sorted(results)]

    def warm_up(self) -> None:
        """Wait for the helper processes and touch every weight once, so that the first prompt waits for neither."""
        self.decoder.model.wait_until_ready()
        self.run([GenerationRequest("", max_new_tokens=1)])
        self.decoder.drafter.warm_up()


def _kv_memory(config: GPT2Config, asked: int | None) -> int:
    """Bytes for keys and values: as asked for, else a share of the memory, which is always enough for one sequence."""
    from fastgpt2.engine.network.kv_cache import sequence_bytes

    least = sequence_bytes(config)
    if asked is None:
        return max(least, fair_share_of_kv_memory())
    if asked < least:
        raise BadRequest(
            f"kv_memory is {asked} bytes; one sequence of the model's {config.n_positions} positions needs {least}"
        )
    return asked


def _load_beside(folder: Path, size: int, started: float) -> tuple[Tokenizer, float, HelperProcesses | None]:
    """Helpers, about to be ready, and the tokenizer, with the time when it was there."""
    processes = None
    if size > 1:
        from fastgpt2.engine.network.helpers import HelperProcesses

        # Tried again, and complained about, by the first step.
        with contextlib.suppress(OSError):
            processes = HelperProcesses(size - 1)
    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer, perf_counter() - started, processes
