"""Grammars: the forms that guided texts have. llguidance, an extra, is imported here, when there is the first grammar.

A grammar is compiled by a thread beside the decoder, and kept for others that ask the same. A process of its own has
tried it before (`grammar_trial.py`), unless it is a list of choices, which is harmless. What a text then takes, a token
at a time, llguidance bounds by numbers.

A mask allows each token whose bytes go on with a text of the grammar, however the tokenizer itself would have cut that
text. The bytes of all tokens together are the text that follows the prompt, and nothing is added to them.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.decoding.grammar_trial import Trial, limits
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.errors import BadRequest, FastGPT2Error

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Grammars that are kept: a typical one takes 1 MB, and the largest that its limits allow 30.
KEPT_GRAMMARS = 16
KEPT_CHARACTERS = 1 << 20

# What llguidance finds out about a grammar, text by text, stays with the grammar. After this number of tokens the
# grammar is compiled anew, so that it stays small.
TOKENS_A_GRAMMAR = 4096

# A grammar that takes longer to compile is not compiled in the midst of a step.
_QUICK_SECONDS = 0.05

# No byte of a token is allowed by force: which of the tokens comes is for the model to say.
_HEAD = '%llguidance {"no_forcing": true}\nstart: '

# In JSON, a single space may stand wherever there may be whitespace. Of more, a greedy text might never find an end.
_JSON_OPTIONS = {"whitespace_pattern": r"\x20", "item_separator": ",", "key_separator": ":"}

_TOO_COMPLEX = re.compile(r"fuel|too (many|large|complex)|precomputation|max is|Unable to determine", re.IGNORECASE)
_PLACE = re.compile(r'(at \d+\(\d+\): )?(failed to compile JSON schema: |failed to parse "%json": )?')

# What the library does not have of JSON schemas, and what to say of it instead: it names options of its own.
_MISSING = re.compile(r"Unimplemented keys: \[(.*)\]")
_NO_ONE_OF = "oneOf constraints are not supported"

# The library takes a group of this name for something else.
_STOP_GROUP = re.compile(r"\(\?P?<stop>")

_Key = tuple[str, str | tuple[str, ...]]
Bits = NDArray[np.uint8]


class Matcher:
    """The place of a text in its grammar."""

    def __init__(self, grammar: Grammar, state: LLMatcher) -> None:
        self._grammar, self._state = grammar, state
        self._token_ids: list[int] = []
        # Which tokens may come next; None if that is not known yet.
        self._allowed: Bits | None = None

    @property
    def may_end(self) -> bool:
        """Tell whether the text so far is complete."""
        return self._state.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Tell whether the text so far is complete and no token can follow."""
        if not self.may_end:
            return False
        return self._state.is_stopped() or not self.allowed_bits().any()

    def mask(self, scores: NDArray[np.float32]) -> None:
        """Set the scores [vocab_size] of tokens that may not come next to minus infinity.

        A token without bytes, as one that ends a text, may never come next.

        Raises:
            BadRequest: the grammar is too complex for this text, or the vocabulary has no token that goes on with it.
        """
        # Without a branch for each token this takes 17 us for 50,257 of them, and not up to 150.
        scores += _penalties().take(self.allowed_bits(), axis=0).ravel()[: len(scores)]

    def push(self, token_id: int) -> None:
        """Take in the text's next token.

        Raises:
            BadRequest: the grammar is too complex for this text, or does not allow this token.
        """
        if not self._state.consume_token(token_id):
            self._start_again()
            if not self._state.consume_token(token_id):
                raise self._failure()
        self._token_ids.append(token_id)
        self._allowed = None
        self._grammar.tokens += 1

    def pop(self) -> None:
        """Forget the token that was pushed last."""
        self._token_ids.pop()
        self._allowed = None
        if not self._state.rollback(1):
            self._start_again()

    def allowed_bits(self) -> Bits:
        """Return which tokens may come next, a bit for each, the lowest bit of a byte first."""
        if self._allowed is None:
            allowed = self._grammar.allowed(self._state)
            if allowed is None:
                self._start_again()
                allowed = self._grammar.allowed(self._state)
                if allowed is None:
                    raise self._failure()
            self._allowed = allowed
        return self._allowed

    def _start_again(self) -> None:
        """Go on with what nobody else has used: what other texts have left in the grammar may have met a limit.

        Whether a text meets a limit is then its own affair.
        """
        state = self._grammar.compile_anew()
        if state is None or not state.consume_tokens(self._token_ids):
            raise self._failure()
        self._state = state

    def _failure(self) -> BadRequest:
        self._grammar.is_worn = True
        reason = explain(self._grammar.name, self._state.get_error())
        return BadRequest(f"{reason} (met at token {len(self._token_ids)} of the text)")


class Grammar:
    """A compiled grammar, which many texts may share.

    Args:
        name: the field that has the grammar, for messages.
        source: the grammar in llguidance's own language.

    Attributes:
        tokens: the number of tokens that texts have taken.
        is_worn: compile the grammar anew for the next text.

    Raises:
        BadRequest: llguidance refuses the grammar, or no text of the vocabulary's tokens is one of the grammar's.
    """

    def __init__(self, name: str, source: str, vocabulary: LLTokenizer) -> None:
        self.name = name
        self._source, self._vocabulary = source, vocabulary
        self.tokens = 0
        self.is_worn = False
        began = time.perf_counter()
        self._start = self._compile()
        # The first mask is the dearest: it shows most of a grammar to the library for the first time.
        allowed = self.allowed(self._start)
        if allowed is None:
            raise BadRequest(explain(name, self._start.get_error()))
        if not allowed.any():
            raise BadRequest(f"{name} allows no text but an empty one: allow another")
        self._seconds = time.perf_counter() - began

    def matcher(self) -> Matcher:
        """Return the place of a new text."""
        return Matcher(self, self._start.deep_copy())

    def allowed(self, state: LLMatcher) -> Bits | None:
        """Return which tokens may come next; None if none may and the text may not end, or on a limit."""
        if state.is_error():
            return None
        bits = np.frombuffer(state.compute_bitmask(), np.uint8)
        if state.is_error():
            return None
        # The last token of all, which ends a text, is none of the model's.
        size = self._vocabulary.vocab_size - 1
        bits = bits[: -(-size // 8)].copy()
        bits[-1] &= 0xFF >> (-size % 8)
        return bits

    def compile_anew(self) -> LLMatcher | None:
        """Return the beginning of a text in the grammar, compiled anew; None if that takes long."""
        return self._compile() if self._seconds < _QUICK_SECONDS else None

    def _compile(self) -> LLMatcher:
        from llguidance import LLMatcher

        # While it compiles, other threads go on.
        return LLMatcher(self._vocabulary, self._source, log_level=0, limits=limits())


class Grammars:
    """The grammars of a decoder, the latest of them kept. For use by one thread.

    Args:
        vocab_size: the model's; the tokenizer's may be another.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._kept: OrderedDict[_Key, Future[Grammar]] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None
        self._vocabulary: LLTokenizer | None = None
        self._trial = Trial()

    def compile(self, request: GenerationRequest, prompt_ids: Sequence[int]) -> Future[Grammar]:
        """Begin to compile the grammar of a guided request, unless it is there, and return at once.

        Raises:
            BadRequest: this model's tokens do not fit grammars. What else is wrong comes as the future's exception,
                a BadRequest again.
        """
        self._check_tokenizer(prompt_ids)
        key = key_of(request)
        known = self._kept.pop(key, None)
        is_tried = False
        if known is not None and known.done():
            failure = known.exception()
            if failure is None:
                is_tried = True
                grammar = known.result()
                known = None if grammar.is_worn or grammar.tokens > TOKENS_A_GRAMMAR else known
            elif not isinstance(failure, BadRequest):
                known = None
        if known is None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "grammars")
            known = self._thread.submit(self._compile, *key, is_tried)
        self._kept[key] = known
        while len(self._kept) > KEPT_GRAMMARS or sum(map(_characters, self._kept)) > KEPT_CHARACTERS:
            self._kept.popitem(last=False)
        return known

    def close(self) -> None:
        """Give up what is to be compiled, and end the process that tries grammars: this process is about to end."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None
        self._trial.stop()

    def _check_tokenizer(self, prompt_ids: Sequence[int]) -> None:
        """Raise BadRequest if the text behind a prompt is not simply the bytes of its tokens."""
        if not self._tokenizer.has_fixed_bytes:
            raise BadRequest(
                "this model's tokenizer changes the text of a token by the tokens around it, so that no text can be "
                "guided: leave choices, regex and json_schema out"
            )
        if not self._tokenizer.continues(prompt_ids):
            raise BadRequest(
                "this model's tokenizer writes the first token of a text otherwise than those that follow, so that no "
                "text can be guided from its beginning: give a prompt"
            )

    def _compile(self, name: str, value: str | tuple[str, ...], is_tried: bool) -> Grammar:
        """Compile a grammar; this runs in the thread."""
        try:
            return self._make(name, value, is_tried)
        except BaseException as reason:
            # A panic of Rust's is no Exception, and would end whoever waits for the grammar.
            if isinstance(reason, Exception):
                raise
            raise FastGPT2Error(f"{name} cannot be used: llguidance has failed ({reason})") from None

    def _make(self, name: str, value: str | tuple[str, ...], is_tried: bool) -> Grammar:
        try:
            import llguidance  # noqa: F401
        except ImportError as reason:
            raise BadRequest(
                f"{name} needs llguidance, which is not installed where the model runs ({reason}): "
                "pip install 'fastgpt2[guided]'"
            ) from None
        source = source_of(name, value)
        # Strings side by side hold nothing that could grow.
        if not is_tried and name != "choices" and (refused := self._trial.run(name, source)):
            raise BadRequest(explain(name, refused))
        if self._vocabulary is None:
            self._vocabulary = make_vocabulary(self._tokens())
        return Grammar(name, source, self._vocabulary)

    def _tokens(self) -> list[bytes]:
        tokens = []
        for token_id in range(self._vocab_size):
            tokens.append(self._tokenizer.token_bytes(token_id))
            if not token_id % 128:
                # Let a step go on that runs meanwhile.
                time.sleep(0)
        return tokens


@cache
def _penalties() -> NDArray[np.float32]:
    """Return what is added to the scores of eight tokens, by the byte that says which of them may come: [256, 8]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, 0.0, -np.inf).astype(np.float32)


def key_of(request: GenerationRequest) -> _Key:
    """Return the name of the field that guides a request, and its value."""
    if request.choices:
        return "choices", request.choices
    if request.regex is not None:
        return "regex", request.regex
    assert isinstance(request.json_schema, str)
    return "json_schema", request.json_schema


def _characters(key: _Key) -> int:
    value = key[1]
    return len(value) if isinstance(value, str) else sum(map(len, value))


def source_of(name: str, value: str | tuple[str, ...]) -> str:
    """Return a grammar in llguidance's own language: a regular expression, or a schema.

    Raises:
        BadRequest: the regular expression means something else to the library, or the schema is too deep.
    """
    if not isinstance(value, str):
        return f"{_HEAD}/{'|'.join(map(_escaped, value))}/"
    if name == "regex":
        return f"{_HEAD}/{_quoted(value)}/"
    try:
        schema = json.loads(value)
        if not isinstance(schema, dict):
            schema = {} if schema else {"enum": []}
        return f"{_HEAD}%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"
    except RecursionError:
        raise BadRequest("json_schema is too deep: the limit is 128 levels") from None


def _escaped(text: str) -> str:
    """Return the regular expression for a text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _quoted(regex: str) -> str:
    """Return a regular expression as it stands between two slashes."""
    if _STOP_GROUP.search(regex):
        raise BadRequest('regex has a group named "stop", a name that is taken: name the group otherwise')
    quoted = re.sub(r"(?s)\\(.)|/", _quote, regex)
    if re.search(r"(?s)^(\\.|[^\\])*\\$", regex):
        raise BadRequest("regex ends with a backslash, which escapes nothing: leave it out or write two")
    return quoted


def _quote(found: re.Match[str]) -> str:
    if found[0] == "/":
        return "\\/"
    return "\\x0A" if found[1] == "\n" else found[0]


def explain(name: str, error: str) -> str:
    """Return a sentence on what the library says against a grammar."""
    if "NoExtensionBias" in error:
        return f"{name} allows no text that this model's tokens can write: change it"
    if _TOO_COMPLEX.search(error):
        return f"{name} is too complex: simplify it"
    if _NO_ONE_OF in error:
        return f"{name} cannot be used: two schemas of a oneOf may describe the same value; ask for anyOf instead"
    if missing := _MISSING.search(error):
        keywords = missing[1].replace('"', "")[:200]
        return f"{name} cannot be used: no text is guided by {keywords}; leave this out"
    _, found, reason = error.partition(" (in regex): ")
    if not found:
        reason = error[_PLACE.match(error).end() :]  # type: ignore[union-attr]
    lines = [line.strip() for line in reason.splitlines()] or ["it is unknown why"]
    # Of the library for regular expressions, the last line says what is wrong.
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return f"{name} cannot be used: {reason[:200]}"


class _Tokens:
    """A vocabulary as llguidance reads it."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: Sequence[bytes]) -> None:
        # The library wants a token that ends a text. It is one that the model does not have.
        self.tokens, self.eos_token_id = [*tokens, b""], len(tokens)

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text: none, as no text is forced."""
        del text
        return []


def make_vocabulary(tokens: Sequence[bytes]) -> LLTokenizer:
    """Return tokens as llguidance has them, with one more behind them, which ends a text.

    Python's other threads wait for some of it: twice 80 ms for the 50,257 tokens of GPT-2, once in a process's life.
    """
    from llguidance import LLTokenizer

    whole = LLTokenizer(_Tokens(tokens), slices=[])  # type: ignore[arg-type]
    return whole.with_slices(LLTokenizer.general_slices())
