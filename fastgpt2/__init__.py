"""GPT-2 text generation on CPUs: a numpy engine, and a pool of worker processes that serve it from a Redis queue.

    from fastgpt2 import Client, Engine

`Client` enqueues jobs and reads their results, `AsyncClient` does the same for asyncio; they import neither numpy nor a
tokenizer. `Engine` generates in this process, without a queue. Each is imported when it is first used, so that
`import fastgpt2` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastgpt2.api.client.async_client import AsyncClient
    from fastgpt2.api.client.client import Client, Job
    from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult, Timings, TokenLogprob, Usage
    from fastgpt2.engine.engine import Engine
    from fastgpt2.errors import FastGPT2Error
    from fastgpt2.protocol.messages import Piece

_HOMES = {
    "AsyncClient": "fastgpt2.api.client.async_client",
    "Client": "fastgpt2.api.client.client",
    "Job": "fastgpt2.api.client.client",
    "Engine": "fastgpt2.engine.engine",
    "GenerationRequest": "fastgpt2.engine.decoding.records",
    "GenerationResult": "fastgpt2.engine.decoding.records",
    "Piece": "fastgpt2.protocol.messages",
    "Timings": "fastgpt2.engine.decoding.records",
    "TokenLogprob": "fastgpt2.engine.decoding.records",
    "Usage": "fastgpt2.engine.decoding.records",
    "FastGPT2Error": "fastgpt2.errors",
}

__all__ = [
    "AsyncClient",
    "Client",
    "Engine",
    "FastGPT2Error",
    "GenerationRequest",
    "GenerationResult",
    "Job",
    "Piece",
    "Timings",
    "TokenLogprob",
    "Usage",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastgpt2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
