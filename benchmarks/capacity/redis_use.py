"""What a Redis does between two moments, by its own INFO: time of its main thread, commands, bytes in and out.

Redis carries out commands in one thread: what that thread takes of a core is what a queue can run out of. The thread
that writes the append-only file to disk is beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pool_runs import medians, wait_until

from fastgpt2.bench import Values

# Of the commands that took longest, so many are named in a result.
NAMED_COMMANDS = 8
MEMORY_SECONDS = 20.0


@contextmanager
def metered(connection: Any) -> Iterator[Values]:
    """What is yielded holds, once the block is left: seconds, cpu_us and command_us, share of a core, commands,
    bytes, by_command."""
    found: Values = {}
    before = _look(connection)
    yield found
    after = _look(connection)
    used = {key: after[key] - before[key] for key in before if key != "calls"}
    found.update(used, share=used["cpu_us"] / used["seconds"] / 1e6, by_command=_by_command(before, after))


def _look(connection: Any) -> Values:
    cpu, stats, calls = (connection.info(section) for section in ("cpu", "stats", "commandstats"))
    thread = "_main_thread" if "used_cpu_user_main_thread" in cpu else ""
    return {
        "seconds": time.monotonic(),
        "cpu_us": 1e6 * (cpu[f"used_cpu_user{thread}"] + cpu[f"used_cpu_sys{thread}"]),
        # What its loop spends in commands: the rest of its time goes to waking up, sockets and the append-only file.
        "command_us": stats.get("eventloop_duration_cmd_sum", 0),
        # Those that scripts call are counted too.
        "commands": stats["total_commands_processed"],
        "input_bytes": stats["total_net_input_bytes"],
        "output_bytes": stats["total_net_output_bytes"],
        "calls": {name.removeprefix("cmdstat_"): (each["calls"], each["usec"]) for name, each in calls.items()},
    }


def _by_command(before: Values, after: Values) -> Values:
    """Calls and microseconds of the dearest commands. A script's time holds that of the commands it calls."""
    found = {}
    for name, (calls, us) in after["calls"].items():
        calls_before, us_before = before["calls"].get(name, (0, 0))
        if calls > calls_before:
            found[name] = {"calls": calls - calls_before, "us": us - us_before}
    dearest = sorted(found, key=lambda name: -found[name]["us"])[:NAMED_COMMANDS]
    return {name: found[name] for name in dearest}


def without_names(found: Sequence[Values]) -> Values:
    """Medians and quartiles of what several such blocks hold, but for the commands."""
    return medians([{key: value for key, value in each.items() if key != "by_command"} for each in found])


def server(connection: Any) -> Values:
    """Which one it is, and how it is set up as far as it matters here: `RedisServer` sets the append-only file."""
    facts, stored = connection.info("server"), connection.info("persistence")
    name = facts.get("server_name", "redis")
    return {
        "name": f"{name} {facts.get(f'{name}_version', facts['redis_version'])}",
        "appendonly": bool(stored["aof_enabled"]),
        "allocator": connection.info("memory")["mem_allocator"],
        "maxclients": connection.info("clients").get("maxclients", 10_000),
    }


def memory_used(connection: Any) -> int:
    """Bytes that Redis says it uses, once that has come to rest: connections give their buffers back after a while."""
    connection.execute_command("MEMORY", "PURGE")
    last = [0, 0]

    def at_rest() -> bool:
        time.sleep(0.5)
        last[:] = [last[1], connection.info("memory")["used_memory"]]
        return abs(last[1] - last[0]) < 4096

    wait_until(at_rest, "the memory of Redis to come to rest", MEMORY_SECONDS)
    return last[1]
