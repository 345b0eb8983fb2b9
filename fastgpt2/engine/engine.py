"""The engine: a model, loaded and ready. Text in, text out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, overload

from fastgpt2.engine.decoding.chat_options import is_messages
from fastgpt2.engine.decoding.records import (
    GenerationRequest,
    GenerationResult,
    RequestFields,
    combine,
    list_stops,
    split_prompt,
)
from fastgpt2.engine.loading import LoadedModel, LoadOptions, load_decoder
from fastgpt2.errors import BadRequest
from fastgpt2.fields import fields_of, plain
from fastgpt2.foreign_fields import take_known
from fastgpt2.prompt_lists import is_token_ids, iterate_prompts

if TYPE_CHECKING:
    from fastgpt2.engine.decoding.sequence import Sequence
    from fastgpt2.engine.model.config import GPT2Config
    from fastgpt2.engine.text.tokenizer import Tokenizer

DEFAULT_MODEL = "gpt2"
Prompt: TypeAlias = str | list[int] | Mapping[str, Any] | list[dict[str, str]] | GenerationRequest
# Not any iterable, as a string would be one too.
Prompts: TypeAlias = (
    list[str] | list[list[int]] | list[dict[str, Any]] | list[GenerationRequest] | tuple[Prompt, ...] | Iterator[Prompt]
)

_OPTIONS = tuple(name for name in fields_of(GenerationRequest) if name != "prompt")


class Engine:
    """One model in this process, made by `Engine.load`.

    Not safe for use by several threads at once: a process has one decoder.

    Attributes:
        model: the name under which it was loaded.
        decoder: for callers that admit and step sequences themselves.
        weights, drafts: the options with which it was loaded.
        notes: sentences for people on what the model's files ask for and is not done, each logged when it was loaded.
        learnt_times: what its steps teach of this machine; `keep` writes that down for the next start.
    """

    def __init__(self, model: str, loaded: LoadedModel, weights: str = "float32", drafts: str | int = "off") -> None:
        self.model, self.decoder, self.load_times, self.notes = model, loaded.decoder, loaded.times, loaded.notes
        self.weights, self.drafts, self.learnt_times = weights, drafts, loaded.learnt_times

    @property
    def config(self) -> GPT2Config:
        return self.decoder.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.decoder.tokenizer

    @property
    def chats(self) -> bool:
        """Tell whether chats can be answered: the model has a chat template that can be used."""
        return not self.decoder.chat_template.objection

    @property
    def max_batch(self) -> int:
        """Return how many sequences are decoded side by side at most; where as many as pay, this may change."""
        return self.decoder.model.cache.usable_slots

    def describe(self) -> str:
        """Return how the model is computed, for the log: "openblas-SkylakeX in panels of 64/32, 2 processes"."""
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
        tokenizer: str | os.PathLike[str] | None = None,
        generation_config: str = "auto",
        chat_template: str | os.PathLike[str] | None = None,
    ) -> Engine:
        """Load a model: `demo`, a folder, or a hub id.

        Args:
            model: see `fastgpt2.engine.model.hub.find_model`.
            revision: a branch, tag or commit of a hub's repository; None for `main`.
            threads: the cores to use, each by a process of its own (`network/helpers.py`); None for all, or one if the
                model is small. BLAS itself is held to one thread in this process and, by environment variables, in
                those it starts.
            max_batch: the most sequences that are decoded side by side; None for as many as pay here, which is
                measured the first time that a large model is loaded, and learnt from its steps from then on.
            kv_memory: bytes that the keys and values of all sequences may take; None for a quarter of the memory
                that this process may use, or of its share of it among the workers of a pool.
            prefix_memory: bytes, beside these, in which keys and values of prompts are kept for others that begin
                alike; 0 to keep none, None for an eighth of the bytes for keys and values.
            blas: what multiplies float32 weights: openblas (what numpy brought), mkl (the extra of that name), compiled
                (by LLVM, the extra `compact`), or auto: compiled if it can be, else the faster one of the others.
            weights: float32, as everybody computes the checkpoint; bfloat16 or int8 (the extra `compact`), a half and a
                quarter of the memory to read at every step, and other tokens than float32's here and there.
            drafts: guesses of the next tokens that a step verifies (`decoding/lookup.py`); tokens are the same. off;
                auto, looked up in the text so far, as many as pay; a number, that many wherever there are any; int8, as
                auto, and made by int8 weights as well (the extra `compact`).
            tokenizer: the folder or the hub id of another tokenizer than the model's own, such as `gpt2`; None for the
                model's own. A hub's repository is taken at `main`, whatever `revision` says.
            generation_config: auto, to follow the model's `generation_config.json` as transformers does (and to note
                what is not applied of it); none, to take the ids of `config.json` that begin and end a text, and no
                more.
            chat_template: a file with a chat template in jinja2's language, such as `chat_template.jinja`; None for the
                one that comes with the model's tokenizer, if there is one. It takes the extra `chat`.

        Raises:
            ModelError: the model cannot be found, read or trusted; the message names the file and what is wrong.
            BadRequest: `max_batch` or `threads` is below 1, `blas` or `weights` is unknown or not installed,
                `kv_memory` does not hold one sequence of all the model's positions, `prefix_memory` is neither 0 nor
                enough for one block of them, `drafts` is neither a word above nor 1 to 15, or `generation_config` is
                unknown.
        """
        other = None if tokenizer is None else os.fspath(tokenizer)
        numbers = revision, threads, max_batch, kv_memory, prefix_memory
        template = None if chat_template is None else os.fspath(chat_template)
        options = LoadOptions(*numbers, blas, weights, drafts, other, generation_config, template)
        return cls(os.fspath(model), load_decoder(os.fspath(model), options), weights, drafts)

    @overload
    def generate(self, prompts: Prompts, **options: Unpack[RequestFields]) -> list[GenerationResult]: ...

    @overload
    def generate(self, prompts: Prompt, **options: Unpack[RequestFields]) -> GenerationResult: ...

    def generate(
        self, prompts: Prompt | Prompts, **options: Unpack[RequestFields]
    ) -> GenerationResult | list[GenerationResult]:
        """Continue a prompt, or several at once.

        Args:
            prompts: a text, a list of token ids, a mapping of a `prompt`, or of `messages`, and options of its own,
                which count before those given here, a list of messages, or a GenerationRequest; or a list or another
                iterable of such. Messages make a chat: the text answers them (see `ChatOptions`). Arrays of numpy and
                columns of pandas are lists too; an array with two dimensions is a list of prompts.
            options: those of `RequestFields`; see `GenerationRequest`.

        Returns:
            One result for one prompt, a list in the order of the prompts for several.

        Raises:
            BadRequest: an option or a prompt cannot be served; nothing has been generated then. Of several prompts,
                the error has the number of its prompt as `index`.
        """
        given, is_alone = _prompts_in(prompts)
        fields = list_stops(take_known(options, _OPTIONS))
        requests = []
        for number, prompt in enumerate(given):
            with _naming(number, prompt, None if is_alone else "generate"):
                requests.append(_request(prompt, fields))
        results = self.run(requests, call=None if is_alone else "generate")
        return results[0] if is_alone else results

    def run(
        self,
        requests: Iterable[GenerationRequest],
        between_steps: Callable[[], None] | None = None,
        call: str | None = "run",
    ) -> list[GenerationResult]:
        """Decode requests side by side, as many as there is room for, and return their results in order.

        Args:
            between_steps: called after every step; what it raises ends the run, and the sequences in it are dropped.
            call: what the caller called, by which an error's note tells of its prompt; None for no note.

        Raises:
            PromptTooLong: a prompt leaves no room for its tokens; nothing has been generated then.
            BadRequest: a request is wrong otherwise. A grammar may show only in mid-text that it is too large.
        """
        prompts = []
        for number, request in enumerate(requests):
            with _naming(number, request, call):
                prompts.append(self.decoder.prepare(request))
        waiting = deque((number, text) for number, prompt in enumerate(prompts) for text in range(prompt.request.texts))
        running: dict[tuple[int, int], Sequence] = {}
        results: dict[tuple[int, int], GenerationResult] = {}
        try:
            while waiting or running:
                while waiting and self.decoder.has_room(prompts[waiting[0][0]]):
                    number, text = waiting.popleft()
                    running[number, text] = self.decoder.admit(prompts[number], text)
                if not running:
                    raise RuntimeError("the decoder has no slot or memory left; is it in use elsewhere?")
                self.decoder.step()
                if between_steps is not None:
                    between_steps()
                for key in [key for key, sequence in running.items() if sequence.finished]:
                    sequence = running.pop(key)
                    if sequence.error is not None:
                        with _naming(key[0], prompts[key[0]].request, call):
                            raise sequence.error
                    results[key] = sequence.result(self.model)
        finally:
            for sequence in running.values():
                self.decoder.finish(sequence)
        return [
            combine(prompt.request, [results[number, text] for text in range(prompt.request.texts)])
            for number, prompt in enumerate(prompts)
        ]

    def warm_up(self) -> None:
        """Wait for the helper processes and touch every weight once, so that the first prompt waits for neither."""
        self.decoder.model.wait_until_ready()
        self.run([GenerationRequest("", max_new_tokens=1)])
        self.decoder.drafter.warm_up()


@contextmanager
def _naming(number: int, prompt: object, call: str | None) -> Iterator[None]:
    """Have an error tell which of several prompts it is about; see `FastGPT2Error.name_prompt`."""
    try:
        yield
    except BadRequest as error:
        if call is not None:
            error.name_prompt(number, prompt, call)
        raise


def _request(prompt: Any, fields: Mapping[str, Any]) -> GenerationRequest:
    """Return the request for a prompt, which checks each field."""
    if isinstance(prompt, GenerationRequest):
        if fields:
            name = next(iter(fields))
            raise BadRequest(f"{name} is given beside a request that has been made; put it in there")
        return prompt
    if is_messages(prompt):
        prompt = {"messages": prompt}
    if isinstance(prompt, Mapping):
        prompt, given = split_prompt(prompt, fields)
        fields = list_stops(take_known(given, _OPTIONS))
    return GenerationRequest(prompt, **fields)


def _prompts_in(value: Any) -> tuple[list[Any], bool]:
    """Return the prompts that a caller gives, and whether it is one that stands alone."""
    if is_messages(value):
        return [value], True
    is_mapping = isinstance(value, Mapping) and ("prompt" in value or "messages" in value)
    if is_mapping or isinstance(value, GenerationRequest) or isinstance(plain(value), str) or is_token_ids(value):
        return [value], True
    if getattr(value, "ndim", 0) == 2 and hasattr(value, "dtype"):
        return list(value), False
    return list(iterate_prompts(value, "a string, a list of token ids or a list of such")), False
