"""An engine without a queue, in a process of its own. Started by `memory.py` and `pool/pool.py`.

    python engine_process.py MODEL [--threads N] [--prefix-memory BYTES]

When the engine is loaded and warmed up, the process prints {"weights": the packed file or null, "state": an address in
the mapping with the KV cache}. It answers {"prompt": token ids, "tokens": the number of new ones} with
{"prefill_seconds", "decode_seconds", "seconds"}; the last is all of it, from the line read to the text. It ends with
its input, and holds what a waiting worker holds until then.
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
    options = parser.parse_args()
    engine = Engine.load(options.model, threads=options.threads, prefix_memory=options.prefix_memory)
    engine.warm_up()
    network = engine.decoder.model
    path = network.sets[0].packed.path
    hello = {"weights": str(path) if path else None, "state": network.cache.keys.ctypes.data}
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        asked = json.loads(line)
        result = engine.generate(asked["prompt"], max_new_tokens=asked["tokens"], ignore_eos=True)
        timings = {"prefill_seconds": result.timings.prefill_seconds, "decode_seconds": result.timings.decode_seconds}
        print(json.dumps({**timings, "seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
