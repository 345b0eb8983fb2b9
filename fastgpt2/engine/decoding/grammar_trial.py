"""The trial of a grammar: a process of its own compiles the grammar first, within limits of time and memory.

    python -m fastgpt2.engine.decoding.grammar_trial      started by `Trial`, which writes to its standard input

llguidance bounds what it does by numbers of its own, but for a few schemas: eight `multipleOf` take it hours, and six
hundred `pattern` gigabytes. The operating system bounds a process (`text/trial.py`). A question is a grammar, the
answer what llguidance says against it, "" if nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgpt2.engine.text.trial import TrialProcess, answer_questions, limit_memory
from fastgpt2.errors import BadRequest

if TYPE_CHECKING:
    from llguidance import LLParserLimits

# Twice what the largest schema takes that was found to be compiled at all, and a bit for the library itself.
MAX_MEGABYTES = 256
MAX_SECONDS = 2


def limits() -> LLParserLimits:
    """Return the limits within which llguidance compiles a grammar and follows a text in it.

    Its own limits are twice as high and more. These leave it about 10 ms a token and 30 MB a grammar. A schema of 4 MB,
    where `json_schema` has at most 64 KB, takes all of `initial_lexer_fuel`.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=500_000, step_lexer_fuel=100_000, max_lexer_states=25_000, verbose_errors=False
    )


class Trial(TrialProcess):
    """The process that tries grammars."""

    def __init__(self) -> None:
        super().__init__("fastgpt2.engine.decoding.grammar_trial")

    def run(self, name: str, source: str) -> str:
        """Return what llguidance says against a grammar, "" if nothing.

        Raises:
            BadRequest: the grammar took more time or memory than it may. The message has the `name` of its field.
        """
        answer = self.ask(source)
        if answer is None:
            limit = f"{MAX_SECONDS} s or {MAX_MEGABYTES} MB to compile"
            raise BadRequest(f"{name} is too complex: it takes more than {limit}; simplify it")
        return str(answer)


def main() -> None:
    """Run as the process that tries grammars, until the parent ends."""
    from llguidance import LLMatcher, LLTokenizer

    limit_memory(MAX_MEGABYTES + 64)
    # Its tokens are the 256 bytes. More tokens would make nothing dearer but what llguidance's own limits bound.
    tokenizer = LLTokenizer("byte")

    def compile_once(source: str) -> str:
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits())
        matcher.compute_bitmask()
        return str(matcher.get_error())

    answer_questions(compile_once, MAX_SECONDS)


if __name__ == "__main__":
    main()
