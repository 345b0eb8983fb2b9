"""The whole system at work on a handful of prompts: an embedded Redis, two workers, the endpoint. `make demo` runs it.

It uses the small model that comes with the package, so nothing is downloaded. Ctrl-C stops everything cleanly.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.request

from fastgpt2 import Client, FastGPT2Error, settings
from fastgpt2.process import on_stop_signals
from fastgpt2.system.up import System

PROMPTS = [
    "My name is",
    "Sherlock Holmes",
    "To be, or not to be",
    "It was a cold morning",
    "“What do you make of it, Watson?”",
    "ROMEO:\n",
]


def main() -> int:
    # SIGTERM and a closed terminal act as Ctrl-C does: the contexts are left, and so the system is stopped.
    on_stop_signals(signal.default_int_handler)
    # The demo's system does not depend on your settings.
    for name in [name for name in os.environ if name.startswith("FASTGPT2_")]:
        del os.environ[name]
    started = time.monotonic()
    values = settings.of_system(model="demo", workers="2", port="0", redis_port="0", log_level="warning")
    try:
        with System(values) as system:
            print(f"ready after {time.monotonic() - started:.1f} s: Redis {system.redis_url}, {system.http_url}\n")
            show_jobs(system)
            show_draws(system)
            show_endpoint(system)
    except KeyboardInterrupt:
        print("\ninterrupted; everything has been stopped")
        return 130
    except (FastGPT2Error, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"\nall stopped; {time.monotonic() - started:.1f} s in all")
    return 0


def show_jobs(system: System) -> None:
    """Enqueue the prompts and print their continuations with the times that they took."""
    with Client(system.redis_url) as client:
        jobs = [client.enqueue(prompt, max_new_tokens=40, stop="\n\n") for prompt in PROMPTS]
        for prompt, job in zip(PROMPTS, jobs, strict=True):
            result = job.result(timeout=30)
            t = result.timings
            print(f"--- {prompt}{result.text}")
            print(
                f"    [{result.finish_reason}; {result.usage.prompt_tokens} + {result.usage.completion_tokens} tokens; "
                f"queue {t.queue_seconds * 1e3:.0f} ms, prefill {t.prefill_seconds * 1e3:.0f} ms, "
                f"decode {t.decode_seconds * 1e3:.0f} ms]"
            )


def show_draws(system: System) -> None:
    """Draw three texts of one prompt, and say how to have them again."""
    with Client(system.redis_url) as client:
        result = client.enqueue(PROMPTS[0], temperature=0.8, top_p=0.95, n=3, stop="\n").result(timeout=30)
    print(f"\nDrawn at random; with seed={result.seed} they come again:")
    for text in (result, *result.alternatives):
        print(f"  {PROMPTS[0]}{text.text}")


def show_endpoint(system: System) -> None:
    """Ask the HTTP endpoint for a continuation and for its status, and print both."""
    body = json.dumps({"inputs": "The game is", "parameters": {"max_new_tokens": 12}}).encode()
    # The endpoint is on this machine, so a proxy is passed by.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{system.http_url}/", body, timeout=30) as answer:
        print(f"\nPOST / {body.decode()}\n  {answer.read().decode()}")
    with opener.open(f"{system.http_url}/status", timeout=30) as answer:
        print(f"GET /status\n{json.dumps(json.load(answer), indent=2)}")


if __name__ == "__main__":
    sys.exit(main())
