"""An engine without a queue, which generates when it is asked to. A child of `bench_pool.py`.

    python engine_alone.py MODEL

For {"prompt": token ids, "tokens": how many new ones} it says {"prefill_seconds", "decode_seconds", "seconds"}; the
last is all of it, from the line read to the text. Ends with its input.
"""

from __future__ import annotations

import json
import sys
import time

from fastgpt2.engine.engine import Engine


def main() -> None:
    engine = Engine.load(sys.argv[1], prefix_memory=0)
    engine.warm_up()
    print(json.dumps({"computes_by": engine.describe()}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        asked = json.loads(line)
        result = engine.generate(asked["prompt"], max_new_tokens=asked["tokens"], ignore_eos=True)
        timings = {"prefill_seconds": result.timings.prefill_seconds, "decode_seconds": result.timings.decode_seconds}
        print(json.dumps({**timings, "seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
