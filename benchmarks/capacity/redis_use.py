"""The work of a Redis between two moments, by its own INFO: time of its main thread, commands, bytes in and out.

Redis carries out all commands in one thread: a queue's limit is reached when that thread takes a whole core. The
append-only file is written to disk by another thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.common import medians, wait_until
from fastgpt2.bench import Values

# How many of the commands that took longest a result names.
NAMED_COMMANDS = 8
MEMORY_SECONDS = 20.0


@contextmanager
def metered(connection: Any) -> Iterator[Values]:
    """Yield a dict that holds, once the block is left, what Redis did within it: seconds, cpu_us, command_us, share (of
    a core), commands, input_bytes, output_bytes, by_command."""
    found: Values = {}
    before = _read_counters(connection)
    yield found
    after = _read_counters(connection)
    used = {key: after[key] - before[key] for key in before if key != "calls"}
    found.update(used, share=used["cpu_us"] / used["seconds"] / 1e6, by_command=_by_command(before, after))


def _read_counters(connection: Any) -> Values:
    """Return what Redis has counted since its start."""
    cpu, stats, calls = (connection.info(section) for section in ("cpu", "stats", "commandstats"))
    thread = "_main_thread" if "used_cpu_user_main_thread" in cpu else ""
    return {
        "seconds": time.monotonic(),
        "cpu_us": 1e6 * (cpu[f"used_cpu_user{thread}"] + cpu[f"used_cpu_sys{thread}"]),
        # The time within commands: the rest goes to waking up, sockets and the append-only file.
        "command_us": stats.get("eventloop_duration_cmd_sum", 0),
        # Commands that scripts call are counted too.
        "commands": stats["total_commands_processed"],
        "input_bytes": stats["total_net_input_bytes"],
        "output_bytes": stats["total_net_output_bytes"],
        "calls": {name.removeprefix("cmdstat_"): (each["calls"], each["usec"]) for name, each in calls.items()},
    }


def _by_command(before: Values, after: Values) -> Values:
    """Return calls and microseconds of the commands that took longest. A script's time includes its commands' time."""
    found = {}
    for name, (calls, us) in after["calls"].items():
        calls_before, us_before = before["calls"].get(name, (0, 0))
        if calls > calls_before:
            found[name] = {"calls": calls - calls_before, "us": us - us_before}
    longest = sorted(found, key=lambda name: -found[name]["us"])[:NAMED_COMMANDS]
    return {name: found[name] for name in longest}


def medians_of_use(found: Sequence[Values]) -> Values:
    """Return medians and quartiles over several dicts of `metered`, without `by_command`."""
    return medians([{key: value for key, value in each.items() if key != "by_command"} for each in found])


def describe_server(connection: Any) -> Values:
    """Return which server it is, and the settings that matter here."""
    facts, stored = connection.info("server"), connection.info("persistence")
    name = facts.get("server_name", "redis")
    return {
        "name": f"{name} {facts.get(f'{name}_version', facts['redis_version'])}",
        "appendonly": bool(stored["aof_enabled"]),
        "allocator": connection.info("memory")["mem_allocator"],
        "maxclients": connection.info("clients").get("maxclients", 10_000),
    }


def memory_used(connection: Any) -> int:
    """Return the bytes that Redis uses, once their number is steady.

    Connections give their buffers back only after a while.
    """
    connection.execute_command("MEMORY", "PURGE")
    last = [0, 0]

    def steady() -> bool:
        time.sleep(0.5)
        last[:] = [last[1], connection.info("memory")["used_memory"]]
        return abs(last[1] - last[0]) < 4096

    wait_until(steady, "the memory of Redis to become steady", MEMORY_SECONDS)
    return last[1]
