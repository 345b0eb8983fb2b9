#!/usr/bin/env python3
"""The memory of 1, 2, 4 and 8 engines together: one copy of the weights, and little for each.

    python benchmarks/engine/memory.py --model gpt2

As many processes as --engines says load one model, warm up and wait, as the workers of a pool do. Each uses --threads
(default: the cores divided among them, as a pool divides them), with helper processes. The script then reads what the
kernel says about all of these processes (Linux only):

PSS       a page that k processes map counts 1/k for each: the sum over all processes is what they take together
private   pages of one process alone (Private_Clean + Private_Dirty)
weights   PSS of the mapping of the packed file (or of its copy in memory, for a small model)
state     PSS of the mapping that holds KV cache and activations; where it is private to a process, the kernel may have
          merged neighbours into it
the rest  PSS of everything else: Python, numpy, the tokenizer, shared libraries

`of n copies` is the sum divided by what as many engines with weights of their own would take.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import Child, begin, heading, numbers, parse, parser, progress, write
from fastgpt2.bench import Values, median, table
from fastgpt2.engine.machine import usable_cores

MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ *(.*)$")
FIELD = re.compile(r"^(\w+): +(\d+) kB$")
ENGINE_PROCESS = Path(__file__).with_name("engine_process.py")
SLEEP_SECONDS = 0.2
QUICK = {"engines": [1, 2], "threads": 1}
PARTS = ("pss", "private", "shared", "weights", "state", "rest")


def main() -> None:
    arguments = parser(__doc__, rounds=1)
    arguments.add_argument("--engines", type=numbers, default=[1, 2, 4, 8], help="engines at once; default: 1,2,4,8")
    arguments.add_argument("--threads", type=int, help="threads of each engine; default: cores / engines")
    asked = parse(arguments, QUICK)
    if not Path("/proc/self/smaps_rollup").exists():
        sys.exit("this needs Linux's /proc/PID/smaps_rollup")
    result = begin("memory", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return the memory of each number of engines of one model."""
    held(model, 1, 1)  # packs the model, if it is not packed yet
    entry: Values = {"model": model, "engines": []}
    for count in asked.engines:
        progress(f"{model}: {count} engines")
        threads = asked.threads or max(1, usable_cores() // count)
        runs = [held(model, count, threads) for _ in range(asked.rounds)]
        entry["engines"].append(
            {
                "engines": count,
                "threads": threads,
                "processes": runs[-1]["processes"],
                **{f"{part}_mb": median([run[part] for run in runs]) / 1e6 for part in PARTS},
                "weights_file_mb": runs[-1]["weights_file"] / 1e6,
            }
        )
    progress("")
    for found in entry["engines"]:
        found["of_copies"] = found["pss_mb"] / copies(found)
    show(entry)
    return entry


def copies(found: Values) -> float:
    """Return the MB that as many engines would take if each had the weights for itself."""
    return float(found["pss_mb"] - found["weights_mb"] + found["engines"] * found["weights_file_mb"])


def held(model: str, count: int, threads: int) -> Values:
    """Return bytes, summed over the processes of `count` idle engines."""
    children: list[Child] = []
    try:
        for _ in range(count):
            children.append(Child([sys.executable, ENGINE_PROCESS, model, "--threads", str(threads)]))
        time.sleep(SLEEP_SECONDS)  # until the helpers, too, have gone to sleep
        total = dict.fromkeys(PARTS, 0.0)
        processes = 0
        for child in children:
            pid = child.process.pid
            for member in (pid, *descendants(pid)):
                processes += 1
                for part, size in of_process(member, child.hello, member == pid).items():
                    total[part] += size
        file = children[0].hello["weights"]
        size = Path(file).stat().st_size if file else total["weights"] / count
        return {**total, "processes": processes, "weights_file": size}
    finally:
        for child in children:
            child.close()


def of_process(pid: int, hello: Values, first: bool) -> dict[str, float]:
    """Return bytes of one process.

    Args:
        hello: what its engine's first process has said of itself.
        first: whether it is that process.
    """
    rollup = fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
    weights = state = 0.0
    for low, high, name, sizes in mappings(Path(f"/proc/{pid}/smaps").read_text()):
        if name == hello["weights"] or name.startswith("/memfd:fastgpt2-weights"):
            weights += sizes["Pss"]
        elif name.startswith("/memfd:fastgpt2-state") or (first and low <= hello["state"] < high):
            state += sizes["Pss"]
    return {
        "pss": rollup["Pss"],
        "private": rollup["Private_Clean"] + rollup["Private_Dirty"],
        "shared": rollup["Shared_Clean"] + rollup["Shared_Dirty"],
        "weights": weights,
        "state": state,
        "rest": rollup["Pss"] - weights - state,
    }


def fields(text: str) -> dict[str, float]:
    """Return the bytes of each field of a file such as smaps_rollup, by name."""
    return {match[1]: 1024.0 * int(match[2]) for line in text.splitlines() if (match := FIELD.match(line))}


def mappings(text: str) -> list[tuple[int, int, str, dict[str, float]]]:
    """Return first address, the address after the last, name, and bytes by field of each mapping in an smaps file."""
    found: list[tuple[int, int, str, dict[str, float]]] = []
    for line in text.splitlines():
        if match := MAPPING.match(line):
            found.append((int(match[1], 16), int(match[2], 16), match[3], {}))
        elif match := FIELD.match(line):
            found[-1][3][match[1]] = 1024.0 * int(match[2])
    return found


def descendants(pid: int) -> list[int]:
    """Return the ids of a process's children, of their children, and so on."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended meanwhile
            continue
        if int(after_name[1]) == pid:
            children.append(int(stat.parent.name))
    return children + [below for child in children for below in descendants(child)]


def show(entry: Values) -> None:
    """Print the table of one model."""
    heading(f"{entry['model']}: MB; the weights' file has {entry['engines'][0]['weights_file_mb']:.1f}")
    first = entry["engines"][0]
    rows = []
    for e in entry["engines"]:
        further = (e["pss_mb"] - first["pss_mb"]) / (e["engines"] - first["engines"]) if e is not first else None
        sizes = [f"{e[f'{part}_mb']:.1f}" for part in ("pss", "weights", "state", "rest", "private")]
        more = f"{further:.1f}" if further is not None else ""
        rows.append([str(e["engines"]), str(e["processes"]), *sizes, more, f"{e['of_copies']:.0%}"])
    headers = [
        "engines",
        "processes",
        "sum of PSS",
        "weights",
        "state",
        "the rest",
        "private",
        "one more",
        "of n copies",
    ]
    print(table(headers, rows))


if __name__ == "__main__":
    main()
