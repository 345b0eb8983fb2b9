"""The names that another API has for a job's fields, put into the sentences of errors, which have a job's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastgpt2.errors import BadRequest, PromptTooLong

# What stands between quotation marks is a caller's. An apostrophe within a word is no such mark.
_QUOTED = r"""(?<!\w)'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""

# What follows these words is what a library says, in a caller's words.
_SAID_ELSEWHERE = " cannot be used: "


def rename_fields(error: BadRequest, names: Mapping[str, str]) -> BadRequest:
    """Return the error with other names for a job's fields; one that is about something else as it is.

    Args:
        names: the other names, by those of a job.
    """
    if type(error) not in (BadRequest, PromptTooLong) or not names:
        return error
    ours, said, others = str(error).partition(_SAID_ELSEWHERE)
    pattern = rf"{_QUOTED}|\b(?:(?:the|this) )?({'|'.join(names)})\b"
    message = re.sub(pattern, lambda found: names[found[1]] if found[1] else found[0], ours) + said + others
    return type(error)(message)
