"""From a model's name to a decoder: folder, configuration, packed weights, network, tokenizer, in that order.

`load_decoder` is the table of contents. Nothing heavy is imported at the head of this module: the tokenizer's parser
and the helper processes get ready on other cores while numpy is imported and the weights are mapped.
"""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from fastgpt2.engine.decoding.lookup import MOST_DRAFTS
from fastgpt2.engine.machine import fair_share_of_kv_memory, hold_to_one_thread, is_large, processes_for
from fastgpt2.engine.model.config import GPT2Config, read_config
from fastgpt2.engine.model.generation_config import GenerationConfig, read_generation_config
from fastgpt2.engine.model.hub import find_folders
from fastgpt2.errors import BadRequest
from fastgpt2.fields import whole
from fastgpt2.plurals import counted

if TYPE_CHECKING:
    from fastgpt2.engine.decoding.decoder import Decoder
    from fastgpt2.engine.kernels.kernel import Kernel
    from fastgpt2.engine.model.packing import PackedFile
    from fastgpt2.engine.network.gpt2 import GPT2
    from fastgpt2.engine.network.helpers import HelperProcesses
    from fastgpt2.engine.network.step_times import LearntTimes
    from fastgpt2.engine.text.chat_template import ChatTemplate
    from fastgpt2.engine.text.tokenizer import Tokenizer

BLAS_CHOICES = ("auto", "openblas", "mkl", "compiled")
DRAFTS_CHOICES = ("off", "auto", "int8")
GENERATION_CONFIG_CHOICES = ("auto", "none")
WEIGHTS_CHOICES = ("float32", "bfloat16", "int8")
log = logging.getLogger("fastgpt2.engine")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The options of a load, checked when made. `Engine.load` says what each one means, and what is raised."""

    revision: str | None
    threads: int | None
    max_batch: int | None
    kv_memory: int | None
    prefix_memory: int | None
    blas: str
    weights: str
    drafts: str | int
    tokenizer: str | None = None
    generation_config: str = "auto"
    chat_template: str | None = None

    def __post_init__(self) -> None:
        for name in ("threads", "max_batch", "kv_memory", "prefix_memory"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole().check(name, value))
        if self.max_batch is not None and self.max_batch < 1:
            raise BadRequest(f"max_batch must be 1 or more, not {self.max_batch}")
        for name, choices in (
            ("blas", BLAS_CHOICES),
            ("weights", WEIGHTS_CHOICES),
            ("generation_config", GENERATION_CONFIG_CHOICES),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise BadRequest(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        if self.drafts not in DRAFTS_CHOICES and not (type(self.drafts) is int and 1 <= self.drafts <= MOST_DRAFTS):
            raise BadRequest(f"drafts must be {', '.join(DRAFTS_CHOICES)} or 1 to {MOST_DRAFTS}, not {self.drafts!r}")
        if self.drafts == "int8" == self.weights:
            raise BadRequest("drafts by int8 weights are of no use to int8 weights; leave out one of the two")
        if self.threads is not None and self.threads < 1:
            raise BadRequest(f"threads must be 1 or more, not {self.threads}")

    @property
    def most_drafts(self) -> int | None:
        """Guesses to look up for each sequence in a step: 0 for none, None for as many as pay."""
        if isinstance(self.drafts, int):
            return self.drafts
        return 0 if self.drafts == "off" else None


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Seconds from the start of `load_decoder` until each part was there. Tokenizer and weights load side by side."""

    mapped: float
    tokenizer: float
    loaded: float


class LoadedModel(NamedTuple):
    """A model that can take requests.

    Attributes:
        notes: sentences for people on what the model's files ask for and is not done.
        learnt_times: what the decoder's steps teach of this machine, to be kept for the next start.
    """

    decoder: Decoder
    times: LoadTimes
    notes: tuple[str, ...]
    learnt_times: LearntTimes


def load_decoder(model: str, options: LoadOptions) -> LoadedModel:
    """Load a model, until it can take requests. Raises as `Engine.load`."""
    started = perf_counter()
    hold_to_one_thread()
    folder, tokenizer_folder = find_folders(model, options.revision, options.tokenizer)
    config = read_config(folder)
    generation = read_generation_config(folder, config, options.generation_config)
    size = processes_for(config, options.threads)
    # The tokenizer's parser releases the GIL, and helpers are other processes.
    with ThreadPoolExecutor(2, thread_name_prefix="tokenizer") as threads:
        beside = threads.submit(_load_beside, tokenizer_folder, size, started)
        chat_beside = threads.submit(_load_chat_template, tokenizer_folder, options.chat_template)
        from fastgpt2.engine.decoding.decoder import Decoder
        from fastgpt2.engine.decoding.drafter import Drafter
        from fastgpt2.engine.kernels.choice import open_measurements
        from fastgpt2.engine.network.batch_limit import BatchLimit
        from fastgpt2.engine.network.prefixes import prefixes_within
        from fastgpt2.engine.network.step_costs import StepCosts
        from fastgpt2.engine.network.step_times import LearntTimes, choose_slots, row_costs, slots_to_map

        kv_bytes = _kv_bytes(config, options.kv_memory)
        prefixes = prefixes_within(config, options.prefix_memory, kv_bytes)
        network = load_network(
            folder,
            config,
            model,
            n_slots=options.max_batch or slots_to_map(config),
            size=size,
            blas=options.blas,
            weights=options.weights,
            kv_memory=kv_bytes,
            draft_weights="int8" if options.drafts == "int8" else None,
        )
        mapped = perf_counter() - started
        tokenizer, tokenizer_done, processes = beside.result()
        chat_template = chat_beside.result()
    if processes is not None:
        network.start_helpers(processes)
    bos = tokenizer.bos_token_id
    if generation.bos_token_id is None and bos is not None and bos < config.vocab_size:
        # transformers generates nothing from an empty prompt then. What comes closest to a beginning is taken.
        generation = generation._replace(bos_token_id=bos)
    measurements, most_drafts = open_measurements(config), options.most_drafts
    if options.max_batch is None:
        choose_slots(network, measurements)
    costs = StepCosts(row_costs(network, measurements, options.max_batch is None and most_drafts is None))
    limit = BatchLimit(network, adapts=options.max_batch is None and is_large(config))
    drafter = Drafter(network, most_drafts, costs)
    decoder = Decoder(network, tokenizer, generation, prefixes, drafter, chat_template, limit)
    learnt_times = LearntTimes(network, measurements if is_large(config) else None, limit, costs)
    times = LoadTimes(mapped, tokenizer_done, perf_counter() - started)
    notes = (*network.sets[0].packed.notes, *notes_on_text(config, tokenizer, generation), *chat_template.notes)
    return LoadedModel(decoder, times, note(model, *notes), learnt_times)


def notes_on_text(config: GPT2Config, tokenizer: Tokenizer, generation: GenerationConfig) -> tuple[str, ...]:
    """Return the notes on a model's tokenizer and on its generation settings."""
    beyond = tokenizer.ids_from(config.vocab_size)
    if not beyond:
        return (*tokenizer.notes, *generation.notes)
    first = f"{beyond[0]}, {tokenizer.token_text(beyond[0])!r}"
    more = f"the tokenizer has {counted(len(beyond), 'token')} beyond the model's table of {config.vocab_size}"
    refused = f"{more}; the first is {first}: a prompt with such a token is refused"
    return (refused, *tokenizer.notes, *generation.notes)


def note(model: str, *notes: str) -> tuple[str, ...]:
    """Log notes on a model as warnings, and return them."""
    for one in notes:
        log.warning("%s: %s", model, one)
    return notes


def load_network(
    folder: Path,
    config: GPT2Config,
    model: str,
    *,
    n_slots: int,
    size: int,
    blas: str,
    weights: str = "float32",
    kv_memory: int | None = None,
    draft_weights: str | None = None,
) -> GPT2:
    """Load the network of a model's folder.

    Args:
        model: its name, for people.
        n_slots: sequences that it has room for.
        size: processes to run it on, from `processes_for`.
        blas, weights: as for `Engine.load`.
        kv_memory: bytes for keys and values; None for what `n_slots` sequences can take at most.
        draft_weights: another set of weights, for guesses.

    Raises:
        ModelError: the checkpoint cannot be used, or there is no memory for it.
        BadRequest: MKL or llvmlite is asked for and is not installed.
    """
    # Threads of BLAS beside processes that spin for each other would cost a hundredfold.
    hold_to_one_thread()
    from fastgpt2.engine.network.gpt2 import DEFAULT_MAX_ROWS, GPT2, PREFILL_ROWS_BESIDE
    from fastgpt2.engine.network.transformer import Shape

    packed, kernel = pack_model(folder, config, model, blas, weights)
    draft = pack_model(folder, config, model, blas, draft_weights) if draft_weights is not None else None
    shape = Shape(n_slots, max(DEFAULT_MAX_ROWS, n_slots + PREFILL_ROWS_BESIDE), size)
    return GPT2(config, packed, kernel, shape, kv_memory, draft)


def pack_model(
    folder: Path, config: GPT2Config, model: str, blas: str, weights: str, must_keep: bool = False
) -> tuple[PackedFile, Kernel]:
    """Return the packed file of a model, writing it if there is none, and what multiplies it here.

    Args:
        model, blas, weights: as for `load_network`.
        must_keep: a small model's file is kept in the cache too, and it is an error if that cannot be. So is compiled
            code, if it can be.

    Raises:
        ModelError, BadRequest: as `load_network`, or the cache cannot be written.
    """
    # What is measured for the layout is measured as a worker multiplies.
    hold_to_one_thread()
    from fastgpt2.engine.kernels import keep_code
    from fastgpt2.engine.kernels.choice import choose_kernel, open_measurements
    from fastgpt2.engine.model.packing import pack

    kernel, layout = choose_kernel(config, open_measurements(config), blas, weights)
    packed = pack(folder, config, model, layout, must_keep)
    if must_keep:
        keep_code(kernel, config.activation_function, config.n_head, config.head_dim, config.n_positions)
    return packed, kernel


def _kv_bytes(config: GPT2Config, asked: int | None) -> int:
    """Return the bytes for keys and values: as asked for, else a share of the memory, enough for one sequence."""
    from fastgpt2.engine.network.kv_cache import sequence_bytes

    least = sequence_bytes(config)
    if asked is None:
        return max(least, fair_share_of_kv_memory())
    if asked < least:
        raise BadRequest(
            f"kv_memory is {asked} bytes; one sequence of the model's {config.n_positions} positions needs {least}"
        )
    return asked


def _load_chat_template(folder: Path, path: str | None) -> ChatTemplate:
    """Load the chat template. A process compiles it, if there is one, while the weights are mapped."""
    from fastgpt2.engine.text.chat_template import load_chat_template

    return load_chat_template(folder, path)


def _load_beside(folder: Path, size: int, started: float) -> tuple[Tokenizer, float, HelperProcesses | None]:
    """Start the helper processes, then load the tokenizer. The number is the seconds until the tokenizer was there."""
    processes = None
    if size > 1:
        from fastgpt2.engine.network.helpers import HelperProcesses

        # If that fails, the first step tries again, and complains.
        with contextlib.suppress(OSError):
            processes = HelperProcesses(size - 1)
    from fastgpt2.engine.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer, perf_counter() - started, processes
