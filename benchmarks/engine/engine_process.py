"""An engine that has been warmed up and does nothing: what a waiting worker holds. A child of `bench_memory.py`.

    python idle_engine.py MODEL THREADS

Says {"weights": the packed file or null, "state": an address in the mapping with the KV cache}; ends with its input.
"""

from __future__ import annotations

import json
import sys

from fastgpt2.engine.engine import Engine


def main() -> None:
    engine = Engine.load(sys.argv[1], threads=int(sys.argv[2]))
    engine.warm_up()
    network = engine.decoder.model
    path = network._packed.path
    said = {"weights": str(path) if path else None, "state": network.cache.keys.ctypes.data, "size": network.size}
    print(json.dumps(said), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
