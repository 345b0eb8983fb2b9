"""JSON schemas of what the endpoint takes and gives, with the bounds that the code has."""

from __future__ import annotations

from typing import Any

from fastgpt2.api.client.enqueue import MAX_SECONDS
from fastgpt2.api.http.completions import DEFAULT_MAX_TOKENS, MAX_MODEL_CHARACTERS, MAX_PROMPTS
from fastgpt2.engine.decoding.records import (
    DEFAULT_MAX_NEW_TOKENS,
    MAX_LOGPROBS,
    MAX_NEW_TOKENS,
    MAX_PROMPT_TOKENS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_TOKEN_ID,
)
from fastgpt2.protocol.keys import PRIORITIES
from fastgpt2.protocol.messages import MAX_TIMEOUT_SECONDS

Schema = dict[str, Any]


def _object(properties: dict[str, Schema], required: tuple[str, ...] = (), closed: bool = False) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(required)
    if closed:
        schema["additionalProperties"] = False
    return schema


def _optional(schema: Schema, **more: Any) -> Schema:
    return {"anyOf": [{**schema, **more}, {"type": "null"}]}


def _whole(low: int, high: int, **more: Any) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high, **more}


def _only(*values: Any) -> Schema:
    """What a greedy decoder takes of a sampling parameter."""
    return {"enum": [*values, None], "description": "Greedy decoding takes nothing else."}


def _list(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_FLAG: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TEXT: Schema = {"type": "string"}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
_NUMBER_OR_NULL: Schema = {"type": ["number", "null"]}
_IDS = _list(_whole(0, MAX_TOKEN_ID), maxItems=MAX_PROMPT_TOKENS)
_PROMPT: Schema = {"anyOf": [_TEXT, _IDS]}
_STOP_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOP: Schema = {"anyOf": [_STOP_TEXT, _list(_STOP_TEXT, maxItems=MAX_STOP_STRINGS)]}
_PRIORITY: Schema = {"enum": list(PRIORITIES)}
_LOGPROBS = _whole(0, MAX_LOGPROBS)
_TIMEOUT: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_SECONDS}

# As `GenerationRequest`, `JobOptions` and `JobPlan` have them.
_JOB_FIELDS: dict[str, Schema] = {
    "max_new_tokens": _optional(_whole(0, MAX_NEW_TOKENS), description=f"{DEFAULT_MAX_NEW_TOKENS} by default."),
    "min_new_tokens": _optional(_whole(0, MAX_NEW_TOKENS)),
    "stop": _optional(_STOP),
    "ignore_eos": _optional(_FLAG),
    "logprobs": _optional(_LOGPROBS),
    "prompt_logprobs": _optional(_LOGPROBS),
    "echo": _optional(_FLAG),
    "timeout": _optional(_TIMEOUT),
    "priority": _optional(_PRIORITY),
    "job_timeout": _optional(_whole(1, MAX_SECONDS)),
    "result_ttl": _optional(_whole(1, MAX_SECONDS)),
}
_PARAMETERS = _optional(
    _object(
        {
            **_JOB_FIELDS,
            "return_full_text": _optional(_FLAG),
            "details": _optional(_FLAG),
            "decoder_input_details": _optional(_FLAG),
            "top_n_tokens": _optional(_LOGPROBS),
            "best_of": _only(1),
            "do_sample": _only(False),
            "frequency_penalty": _only(0),
            "repetition_penalty": _only(1),
            "seed": {"type": ["integer", "null"]},
            "temperature": _only(0),
            "top_p": _only(1),
            "typical_p": _only(1),
            "watermark": _only(False),
        },
        closed=True,
    )
)
_LOGPROB = _object(
    {
        "token_id": _COUNT,
        "token": _TEXT,
        "logprob": _NUMBER_OR_NULL,
        "text_offset": _COUNT,
        "top": _list(_object({"token_id": _COUNT, "token": _TEXT, "logprob": _NUMBER})),
    },
    ("token_id", "token", "logprob"),
)
_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "cached_tokens": {
            **_COUNT,
            "description": "Of the prompt's, those that were not computed.",
        },
    },
    ("prompt_tokens", "completion_tokens"),
)
_OPENAI_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}, ("cached_tokens",)),
        "completion_tokens_details": _object(
            {"accepted_prediction_tokens": _COUNT, "rejected_prediction_tokens": _COUNT},
            ("accepted_prediction_tokens", "rejected_prediction_tokens"),
        ),
    },
    (
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
        "prompt_tokens_details",
        "completion_tokens_details",
    ),
)
_DRAFTING = _object(
    {
        "steps": {**_COUNT, "description": "That gave the tokens after the first."},
        "drafted": {**_COUNT, "description": "Guesses that they verified."},
        "accepted": {**_COUNT, "description": "Those of them that came true, each of which saved a step."},
    },
    ("steps", "drafted", "accepted"),
)
_RESULT = _object(
    {
        "version": _COUNT,
        "text": _TEXT,
        "token_ids": _list(_COUNT),
        "finish_reason": {"enum": ["stop", "length", "cancelled", "timeout"]},
        "usage": _USAGE,
        "timings": _object(dict.fromkeys(("queue_seconds", "prefill_seconds", "decode_seconds"), _NUMBER)),
        "model": _TEXT,
        "drafting": _DRAFTING,
        "logprobs": _list(_LOGPROB),
        "prompt_logprobs": _list(_LOGPROB),
    },
    ("text", "token_ids", "finish_reason", "usage", "timings", "model", "drafting"),
)
_OPENAI_ERROR = _object(
    {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL},
    ("message", "type", "param", "code"),
)
_TGI_TOKEN = _object(
    {"id": _COUNT, "text": _TEXT, "logprob": _NUMBER_OR_NULL, "special": _FLAG}, ("id", "text", "logprob")
)
_DETAILS = _object(
    {
        "finish_reason": {"enum": ["length", "eos_token", "stop_sequence"]},
        "generated_tokens": _COUNT,
        "input_length": _COUNT,
        "seed": {"type": "null"},
        "prefill": _list(_TGI_TOKEN),
        "tokens": _list(_TGI_TOKEN),
        "top_tokens": _list(_list(_TGI_TOKEN)),
    },
    ("finish_reason", "generated_tokens"),
)
_GENERATED = _object({"generated_text": _TEXT, "details": _DETAILS, "logprobs": _list(_LOGPROB)}, ("generated_text",))
_LISTS = _object(
    {
        "tokens": _list(_TEXT),
        "token_logprobs": _list(_NUMBER_OR_NULL),
        "top_logprobs": _list({"anyOf": [{"type": "object", "additionalProperties": _NUMBER}, {"type": "null"}]}),
        "text_offset": _list(_COUNT),
    },
    ("tokens", "token_logprobs", "top_logprobs", "text_offset"),
)
_CHOICE = _object(
    {
        "index": _COUNT,
        "text": _TEXT,
        "logprobs": _optional(_LISTS),
        "finish_reason": {"enum": ["stop", "length", None]},
    },
    ("index", "text", "logprobs", "finish_reason"),
)
_JOB = {
    "id": _TEXT,
    "object": {"const": "job"},
    "status": {
        "enum": ["queued", "started", "finished", "failed", "stopped", "canceled", "deferred", "scheduled", "expired"]
    },
    "enqueued_at": _NUMBER_OR_NULL,
    "started_at": _NUMBER_OR_NULL,
    "ended_at": _NUMBER_OR_NULL,
    "worker": _TEXT_OR_NULL,
    "attempts": _COUNT,
    "result": _optional(_RESULT, description="Of a job that was cut short, what there is of it."),
    "error": _optional(_OPENAI_ERROR),
    "cancelled": _FLAG,
}
_LISTED_JOB = _object(
    {
        "id": _TEXT,
        "status": _TEXT,
        "finish_reason": _TEXT_OR_NULL,
        "error": _TEXT_OR_NULL,
        "prompt_tokens": {"type": ["integer", "null"]},
        "cached_tokens": {"type": ["integer", "null"]},
        "completion_tokens": {"type": ["integer", "null"]},
        "steps": {"type": ["integer", "null"]},
        "drafted": {"type": ["integer", "null"]},
        "accepted": {"type": ["integer", "null"]},
        "queue_seconds": _NUMBER_OR_NULL,
        "prefill_seconds": _NUMBER_OR_NULL,
        "decode_seconds": _NUMBER_OR_NULL,
        "ended_at": _NUMBER_OR_NULL,
        "worker": _TEXT_OR_NULL,
        "prompt": {"anyOf": [_TEXT, _list(_COUNT), {"type": "null"}], "description": "If the operator shows prompts."},
    },
    ("id", "status"),
)
_MODEL = _object(
    {"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT},
    ("id", "object", "created", "owned_by"),
)

SCHEMAS: dict[str, Schema] = {
    "OriginalRequest": _object(
        {"inputs": _PROMPT, "parameters": _PARAMETERS, "stream": _FLAG}, ("inputs",), closed=True
    ),
    "GenerateRequest": _object({"inputs": _PROMPT, "parameters": _PARAMETERS}, ("inputs",), closed=True),
    "Generated": _GENERATED,
    "GeneratedList": _list(_ref("Generated"), minItems=1, maxItems=1),
    "TokenEvent": _object(
        {
            "index": _COUNT,
            "token": _TGI_TOKEN,
            "top_tokens": _list(_TGI_TOKEN),
            "generated_text": _TEXT_OR_NULL,
            "details": _optional(_DETAILS),
        },
        ("index", "token", "generated_text", "details"),
    ),
    "CompletionRequest": _object(
        {
            "model": _optional({"type": "string", "minLength": 1, "maxLength": MAX_MODEL_CHARACTERS}),
            "prompt": {
                "anyOf": [
                    _TEXT,
                    _list(_TEXT, minItems=1, maxItems=MAX_PROMPTS),
                    {**_IDS, "minItems": 1},
                    _list(_IDS, minItems=1, maxItems=MAX_PROMPTS),
                    {"type": "null"},
                ]
            },
            "max_tokens": _optional(_whole(0, MAX_NEW_TOKENS), description=f"{DEFAULT_MAX_TOKENS} by default."),
            "stop": _optional(_STOP),
            "stream": _optional(_FLAG),
            "stream_options": _optional(
                _object({"include_usage": _FLAG, "include_obfuscation": _FLAG}, closed=True),
                description="With `stream` only.",
            ),
            "echo": _optional(_FLAG),
            "logprobs": _optional(_LOGPROBS, description="With `echo`, of the prompt's tokens too."),
            "temperature": _only(0),
            "top_p": {
                "type": ["number", "null"],
                "exclusiveMinimum": 0,
                "maximum": 1,
                "description": "1, unless temperature is 0.",
            },
            "n": _only(1),
            "best_of": _only(1),
            "presence_penalty": _only(0),
            "frequency_penalty": _only(0),
            "logit_bias": _optional({"type": "object", "maxProperties": 0}),
            "suffix": _only(""),
            "seed": {"type": ["integer", "null"]},
            "user": _TEXT_OR_NULL,
            "ignore_eos": _optional(_FLAG),
            "min_tokens": _optional(_whole(0, MAX_NEW_TOKENS)),
            "priority": _optional(_PRIORITY),
        },
        closed=True,
    ),
    "Completion": _object(
        {
            "id": _TEXT,
            "object": {"const": "text_completion"},
            "created": _COUNT,
            "model": _TEXT,
            "system_fingerprint": _TEXT,
            "choices": _list(_CHOICE),
            "usage": _optional(_OPENAI_USAGE),
        },
        ("id", "object", "created", "model", "choices"),
    ),
    "Model": _MODEL,
    "ModelList": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}, ("object", "data")),
    "JobRequest": _object({"prompt": _PROMPT, **_JOB_FIELDS, "stream": _optional(_FLAG)}, ("prompt",), closed=True),
    "Job": _object(_JOB, tuple(name for name in _JOB if name != "cancelled")),
    "JobList": _object({"object": {"const": "list"}, "data": _list(_LISTED_JOB)}, ("object", "data")),
    "TextEvent": _object({"text": _TEXT, "at": _COUNT}, ("text", "at")),
    "EndEvent": _object({"result": _JOB["result"], "error": _JOB["error"]}, ("result", "error")),
    "State": _object({"status": _TEXT}, ("status",)),
    "Status": _object(
        {
            "version": _TEXT,
            "queue": _object({"name": _TEXT, "depth": _COUNT}, ("name", "depth")),
            "jobs": {"type": "object", "additionalProperties": _COUNT},
            "workers": _list({"type": "object"}),
        },
        ("version", "queue", "jobs", "workers"),
    ),
    "Error": _object({"error": _TEXT, "error_type": _TEXT}, ("error", "error_type")),
    "OpenAIError": _object({"error": _OPENAI_ERROR}, ("error",)),
}
