"""What OpenAI's two routes of texts tell alike: the counts of tokens, and how each text has ended.

Source: OpenAI's API reference, and how its Python client types the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NotRequired, TypedDict

from fastgpt2 import __version__
from fastgpt2.api.client.reader import JobReader
from fastgpt2.api.http.responses import error_object, event
from fastgpt2.engine.decoding.options import ChoiceIndex, Seed
from fastgpt2.engine.decoding.records import Count, GenerationResult, StopReason, Usage
from fastgpt2.errors import FastGPT2Error

# What ends a stream.
DONE = b"data: [DONE]\n\n"

# Equal texts can be expected of equal fingerprints.
FINGERPRINT = f"fastgpt2-{__version__}"


class TextEnd(TypedDict):
    """What is told with the end of a text.

    As vLLM's, it says which stop string or token ended it, and, as Together AI's, with which seed it was drawn.
    """

    stop_reason: NotRequired[StopReason]
    seed: NotRequired[
        Annotated[Seed, "With this seed, and the choice_index if there is one, the text can be had again."]
    ]
    choice_index: NotRequired[Annotated[ChoiceIndex, "The index of a text that was drawn, if it is not 0."]]
    cumulative_logprob: NotRequired[Annotated[float, "The sum of all its tokens' log probabilities."]]


class CachedTokens(TypedDict):
    """The tokens of prompts that were not computed."""

    cached_tokens: Count


class PredictedTokens(TypedDict):
    """The fate of guesses. OpenAI's predictions, which come from the caller, are counted by the same names."""

    accepted_prediction_tokens: Count
    rejected_prediction_tokens: Count


class CompletionUsage(TypedDict):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: CachedTokens
    completion_tokens_details: NotRequired[PredictedTokens]


def end_of(result: GenerationResult) -> TextEnd:
    """Return what is told with the end of a text."""
    end: TextEnd = {}
    if result.stop_reason is not None:
        end["stop_reason"] = result.stop_reason
    if result.seed is not None:
        end["seed"] = result.seed
        if result.choice_index:
            end["choice_index"] = result.choice_index
    if result.cumulative_logprob is not None:
        end["cumulative_logprob"] = result.cumulative_logprob
    return end


def usage_of(results: Sequence[GenerationResult]) -> CompletionUsage:
    """Return the counts of all texts. The prompt of several texts is read, and counted, once."""
    texts = [text for result in results for text in (result, *result.alternatives)]
    accepted = sum(text.drafting.accepted for text in texts)
    rejected = sum(text.drafting.drafted for text in texts) - accepted
    prompt_tokens = sum(result.usage.prompt_tokens for result in results)
    completion_tokens = sum(text.usage.completion_tokens for text in texts)
    cached_tokens = sum(result.usage.cached_tokens for result in results)
    return {
        **_counts(prompt_tokens, completion_tokens, cached_tokens),
        "completion_tokens_details": {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected},
    }


def _counts(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> CompletionUsage:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def counts_of(usage: Usage) -> CompletionUsage:
    """Return the counts of a text so far, and of its prompt."""
    return _counts(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


def error_event(error: FastGPT2Error) -> bytes:
    """Return how a stream ends that fails."""
    return event(error_object(error, openai=True)) + DONE


def job_header(jobs: Sequence[JobReader]) -> dict[str, str]:
    """Return a header with the job by which a request can be cancelled or looked up, if the request is one job."""
    return {"x-job-id": jobs[0].id} if len(jobs) == 1 else {}
