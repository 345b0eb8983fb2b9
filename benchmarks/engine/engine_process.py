"""An engine without a queue, in a process of its own. Started by `memory.py`, `pool/pool.py` and `pool/mixed.py`.

    python engine_process.py MODEL [--threads N] [--prefix-memory BYTES] [--weights KIND]

When the engine is loaded and warmed up, the process prints {"weights": the packed file or null, "state": an address in
the mapping with the KV cache, "max_batch": how many sequences it decodes together}. It answers {"prompt": token ids,
"tokens": the number of new ones} with {"prefill_seconds", "decode_seconds", "seconds"}; the last is all of it, from the
line read to the text. To {"prompts": a list of such, "tokens"}, which it decodes together, it answers {"seconds"}. It
ends with its input, and holds what a waiting worker holds until then.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from fastgpt2.engine.engine import Engine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prefix-memory", type=int)
    parser.add_argument("--weights", default="float32")
    options = parser.parse_args()
    engine = Engine.load(
        options.model, threads=options.threads, prefix_memory=options.prefix_memory, weights=options.weights
    )
    engine.warm_up()
    network = engine.decoder.model
    path = network.sets[0].packed.path
    hello = {"weights": str(path) if path else None, "state": network.cache.keys.ctypes.data}
    hello["max_batch"] = engine.max_batch
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        asked = json.loads(line)
        timings = {}
        if "prompts" in asked:
            engine.generate(asked["prompts"], max_new_tokens=asked["tokens"], ignore_eos=True)
        else:
            of = engine.generate(asked["prompt"], max_new_tokens=asked["tokens"], ignore_eos=True).timings
            timings = {"prefill_seconds": of.prefill_seconds, "decode_seconds": of.decode_seconds}
        print(json.dumps({**timings, "seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
