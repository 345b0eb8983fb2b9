"""Plain numpy: the matrix products of a GPT-2 step as `x @ W`, on weights of the model's shapes. Started by `step.py`.

    python plain_numpy.py '{"n_embd": 768, "n_inner": 3072, "n_layer": 12, "vocab_size": 50257}'

It prints {"threads": ..., "kernel": ...}, and then answers {"rows": R, "steps": S} with the seconds of each step, after
one step that is not counted. It computes products only: no layer norm, attention, activation or bias. The token table
lies as a checkpoint holds it, [vocab, K], and is multiplied transposed. BLAS has as many threads as its environment
variables say.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import threadpoolctl


def main() -> None:
    shape = json.loads(sys.argv[1])
    n, inner, vocab = shape["n_embd"], shape["n_inner"], shape["vocab_size"]
    rng = np.random.default_rng(0)

    def weights(n_in: int, n_out: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return rng.random((n_in, n_out), dtype=np.float32)

    blocks = [(weights(n, 3 * n), weights(n, n), weights(n, inner), weights(inner, n)) for _ in range(shape["n_layer"])]
    table = weights(vocab, n)
    about = [info for info in threadpoolctl.threadpool_info() if info["user_api"] == "blas"]
    print(json.dumps({"threads": about[0]["num_threads"], "kernel": about[0].get("architecture")}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        x, hidden = (rng.random((asked["rows"], k), dtype=np.float32) for k in (n, inner))
        seconds = []
        for _ in range(asked["steps"] + 1):
            started = time.perf_counter()
            for c_attn, attn_c_proj, c_fc, mlp_c_proj in blocks:
                x @ c_attn
                x @ attn_c_proj
                x @ c_fc
                hidden @ mlp_c_proj
            x @ table.T
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": seconds[1:]}), flush=True)


if __name__ == "__main__":
    main()
