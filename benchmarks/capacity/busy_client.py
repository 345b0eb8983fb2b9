"""A client that enqueues one job after the other, as fast as it can. Started by `jobs.py`.

    python busy_client.py REDIS_URL QUEUE

It answers {"seconds": how long to enqueue} with {"jobs": how many it has enqueued}. It ends with its input.
"""

from __future__ import annotations

import json
import sys
import time

from fastgpt2 import Client

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def main() -> None:
    with Client(sys.argv[1], sys.argv[2]) as client:
        print(json.dumps({"ready": client.workers()}), flush=True)
        for line in sys.stdin:
            until, jobs = time.monotonic() + json.loads(line)["seconds"], 0
            while time.monotonic() < until:
                client.enqueue(PROMPT, max_new_tokens=0)
                jobs += 1
            print(json.dumps({"jobs": jobs}), flush=True)


if __name__ == "__main__":
    main()
