"""Tables of what `capacity.py` has measured: for the terminal, and for docs/capacity.md, which `report.py` writes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.capacity.plan import KEPT_SECONDS, LENGTHS, SHARE, WORKERS, coefficients, host_bytes, planned
from benchmarks.tables import markdown
from fastgpt2.bench import Values, machine_line

TITLE = """# Capacity: what one Redis bears, and how to plan a thousand workers

For planners of a large pool: formulas, and the measurements that they rest on."""
HEAD = (
    "Made by `benchmarks/report.py` from the newest `capacity.json` in `benchmarks/results/`: do not edit. The head of "
    "`benchmarks/capacity/capacity.py` says how it is measured. All figures are medians. A core of Redis is its main "
    "thread, which carries out all commands."
)

FORMULA = f"""## The formula

    workers       = tokens/s wanted / (tokens/s of a worker)
    RAM of a host = weights, once + its workers x (private + running jobs x positions x KV bytes)
    Redis, us/s   = jobs/s x (job + reading its end) + workers x steps/s x step + workers x lease
                    + pieces/s x (piece + reading it)           of streamed jobs; or workers x idle, while they wait
    Redis, bytes  = workers x KB of a worker + jobs/s x seconds for which results are kept x bytes of a job
    connections   = workers x connections of a worker + those of clients and endpoints, below maxclients

A worker's steps/s are its tokens/s divided by its running jobs. When more than {SHARE:.0%} of its core are taken, a
Redis makes its callers wait. To lower its memory, lower `result_ttl`, which is a day by default. `Redis us` in the
tables are those of a Redis that sleeps between commands. Near its limit a Redis does not sleep any more, and its
time comes closer to `in commands`, which leaves out sockets and the append-only file. So limits derived from `Redis us`
are on the safe side.

An idle worker holds one connection for each queue that it waits for, and up to three others. It waits for three queues
of jobs that name no model, and for three of each name of its model: that makes up to 9 connections with one name, three
more for each further name, and three fewer with `--named-only`.

**When to shard:** before the first limit in the last table. Give each part of the workers a Redis and a queue name of
its own, `fastgpt2 pool --redis-url redis://r1/0 --queue part1`, and an endpoint. Spread requests over the endpoints, by
the caller where idempotency keys matter. Two queues on one Redis share its core: that separates them, but does not
scale.
"""

RUNS = {
    "one": "finished in their first step",
    "short": "not streamed",
    "long": "not streamed",
    "streamed": "streamed, unread",
    "short_read": "not streamed, read",
    "streamed_read": "streamed, read",
}
KINDS = ("enqueued", "served")
READS = {
    "status": "the status of the pool (`/status`)",
    "limits": "what models take, read by each client every 30 s",
    "clean_up": "RQ's clean-up of a queue, by each worker every 10 min for 3 queues",
}


class Section(NamedTuple):
    """A table with a title, and a note below it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def sections(result: Values) -> Iterator[Section]:
    """Yield a section for each part that was measured, and the plan."""
    if "redis" in result:
        yield redis_section(result["redis"], result["load"])
    if "idle" in result:
        yield from idle_sections(result["idle"])
    if "memory" in result:
        yield memory_section(result["memory"])
    if measured := [entry for entry in result["models"] if "pools" in entry]:
        yield workers_section(measured)
        yield from plan_sections(result, measured[-1])  # the others are smaller: nobody needs a thousand workers there


def redis_section(found: Values, load: Sequence[Values]) -> Section:
    """Return the table of what a job costs Redis."""
    server = found["server"]
    rows = []
    for name, label in RUNS.items():
        run = found["runs"][name]
        kb = [f"{run[f'{way}_bytes']['median'] / 1e3:.1f}" for way in ("input", "output")]
        cells = [label, str(run["new_tokens"])]
        cells += [f"{run[key]['median']:.0f}" for key in ("cpu_us", "command_us", "commands")]
        rows.append([*cells, *kb, f"{run['jobs_per_s']['median']:.0f}", f"{run['share']['median']:.0%}"])
    persistence = "appended to a file, synced each second" if server["appendonly"] else "kept in memory only"
    return Section(
        "A job, measured",
        [
            "jobs",
            "new tokens",
            "Redis us",
            "in commands",
            "commands",
            "KB in",
            "KB out",
            "jobs/s here",
            "of Redis's core",
        ],
        rows,
        f"{server['name']} ({server['allocator']}), {persistence}; the demo model, {found['workers']} workers, prompts "
        f"of {found['prompt_tokens']} tokens; read as the endpoint reads, {found['at_once']} at once. "
        f"Figures are per job; commands include those that scripts call. {parts_sentence(found)} {load_sentence(load)}",
    )


def parts_sentence(found: Values) -> str:
    """Return a sentence with what is derived for the parts of a job."""
    labels = {"job": "a job", "read": "reading its end", "piece": "a piece of text", "piece_read": "reading a piece"}
    costs = found["costs_us"]
    labels["step"] = f"a step of a worker with {costs['together']['median']:.0f} jobs"
    parts = [
        f"{label} {m['median']:.0f} ({m['q1']:.0f}-{m['q3']:.0f})" for k, label in labels.items() for m in [costs[k]]
    ]
    return f"Derived, in us of Redis, with quartiles: {', '.join(parts)}."


def load_sentence(found: Sequence[Values]) -> str:
    """Return a sentence about as many jobs as the machine could drive."""
    loads = []
    for each in found:
        rates = [f"{each[k]['jobs_per_s']['median']:.0f}/s ({each[k]['share']['median']:.0%} of Redis)" for k in KINDS]
        us = each["us_per_job"]["median"]
        loads.append(
            f"by {each['processes']}, {rates[0]} and {rates[1]}, {us:.0f} us of Redis a job, so {1e6 / us:.0f}/s for a "
            "whole core, derived"
        )
    return f"Jobs of no new tokens, enqueued by clients, then served by as many workers: {'; '.join(loads)}."


def idle_sections(found: Values) -> Iterator[Section]:
    """Yield the tables of idle workers, and of what grows with their number."""
    rates = ("cpu_us_per_s", "command_us_per_s", "commands_per_s")

    def row(label: str, each: Values, suffix: str) -> list[str]:
        cells = [f"{each[f'{key}{suffix}']:.1f}" for key in (*rates, "connections")]
        return [label, *cells, f"{each[f'memory_bytes{suffix}'] / 1e3:.0f}"]

    rows = [row("none, in all", found["nobody"], "")]
    rows += [row(str(each["workers"]), each, "_each") for each in found["counts"]]
    share = found["counts"][-1]["cpu_us_per_s_each"] * WORKERS / 1e6
    yield Section(
        "An idle worker, measured",
        ["workers", "Redis us/s each", "in commands", "commands/s each", "connections each", "KB of Redis each"],
        rows,
        f"So {WORKERS:,} idle workers would take {share:.0%} of a core, derived from the last row.",
    )
    thousand = found["thousand"]
    beats = [
        [
            beat_label(each),
            f"{each['us_each']:.0f}",
            f"{each['command_us_each']:.0f}",
            f"{each['output_bytes_each'] / 1e3:.1f}",
        ]
        for each in thousand["beats"]
    ]
    reads = [
        [READS[name], f"{each['cpu_us']:.0f}", f"{each['command_us']:.0f}", f"{each['output_bytes'] / 1e3:.1f}"]
        for name, each in thousand["reads"].items()
    ]
    yield Section(
        f"What grows with the workers, measured with the entries of {thousand['leases']:,}",
        ["", "Redis us each time", "in commands", "KB out"],
        [*beats, *reads],
        "Each worker renews its lease once a second. What each worker or client reads of all workers grows with the "
        "square of their number.",
    )


def beat_label(found: Values) -> str:
    """Return the label of a row about leases."""
    lapsed = f", {found['silent']} more lapsed" if found["silent"] else ""
    return f"a lease renewed, of {found['leases']:,}{lapsed}"


def memory_section(found: Sequence[Values]) -> Section:
    """Return a table of one row, in which each kind of job is a column."""
    headers = ["a job"]
    for each in found:
        size = (
            f"prompt of {each['prompt_tokens']}" if each["state"] == "waiting" else f"{each['new_tokens']} new tokens"
        )
        headers.append(f"{each['state']}, {size}{', streamed' if each['stream'] else ''}")
    row = ["MB of Redis per 1,000", *(f"{each['bytes_each'] / 1e6 * 1e3:.1f}" for each in found)]
    return Section(
        "Redis's memory by jobs, measured; finished jobs take it until their `result_ttl` is over", headers, [row]
    )


def workers_section(entries: Sequence[Values]) -> Section:
    """Return a table with a row for each model and pool; a sentence says what the last model's workers hold."""
    rows = []
    for entry in entries:
        for each in entry["pools"]:
            cores, cells = each["workers"] * each["threads"], []
            for name, speed in each["tokens_per_s"].items():
                cells += [f"{speed[key]:.0f}" for key in ("median", "q1", "q3")]
                cells += [f"{speed['median'] / cores:.0f}"] if name == "short" else []
            rows.append([entry["model"], f"{each['workers']} of {each['threads']}", *cells])
    entry = entries[-1]
    each = entry["memory"][-1]
    private, shared = (each[f"{kind}_bytes"]["median"] / 1e6 for kind in ("private", "shared"))
    held = (
        f"Each of {each['workers']} idle workers of {entry['model']} holds {private:.0f} MB of its own, and shares "
        f"{shared:.0f} MB, the weights; together {each['pss_bytes'] / 1e6:.0f} MB (PSS). A position of a running job "
        f"takes {entry['kv_bytes_per_token'] / 1e3:.1f} KB more; "
        "kept beginnings of prompts would take `--prefix-memory` besides; here none were kept."
    )
    short, longer = entry["pools"][-1]["prompt_tokens"].values()
    headers = ["model", "workers of cores", f"prompts of {short:.0f}: tokens/s", "q1", "q3", "by core"]
    return Section(
        "Workers, measured",
        [*headers, f"mixed, {longer:.0f} on average: tokens/s", "q1", "q3"],
        rows,
        f"{entry['in_flight']} jobs in flight for each worker, {entry['new_tokens']} new tokens each, not "
        f"streamed. {held}",
    )


def plan_sections(result: Values, entry: Values) -> Iterator[Section]:
    """Yield the plan of a thousand workers, if everything that it needs was measured."""
    c = coefficients(result, entry)
    if c is None:
        return
    rows = []
    for tokens in LENGTHS:
        cells = [str(tokens), f"{planned(c, tokens, False)['jobs_per_s']:,.0f}"]
        for stream in (False, True):
            plan = planned(c, tokens, stream)
            cells += [f"{plan['redis_cores']:.2f}", f"{plan['redis_bytes'] / 1e9:.1f}", plan["limit"]]
            cells.append(f"{plan['workers_a_redis']:,}")
        rows.append(cells)
    any_plan = planned(c, LENGTHS[0], False)
    each = ("Redis cores", "GB of Redis", "first limit", "workers a Redis")
    hosts = ", ".join(f"{n}: {host_bytes(c, n, 256) / 1e9:.1f}" for n in (8, 32, 64))
    yield Section(
        f"{entry['model']}: {WORKERS:,} workers with a core each, derived",
        ["new tokens", "jobs/s", *each, *(f"{header}, streamed" for header in each)],
        rows,
        f"{any_plan['tokens_per_s']:,.0f} tokens/s; {any_plan['connections']:,.0f} connections of {c.maxclients:,}; "
        f"while all are idle, {any_plan['idle_cores']:.2f} cores of Redis. Results kept for {KEPT_SECONDS / 60:.0f} "
        f"minutes. GB of RAM of a host by its workers, {c.in_flight} jobs of 256 positions running: {hosts}.",
    )


def page(result: Values) -> str:
    """Return the page."""
    note = result["options"].get("note") or ""
    lines = [TITLE, "", textwrap.fill(f"{HEAD} {machine_line(result['machine'])}. {note}", 120), "", FORMULA]
    for section in sections(result):
        lines += [f"## {section.title}", "", *markdown(section.headers, section.rows), ""]
        lines += [textwrap.fill(section.note, 120), ""] if section.note else []
    return "\n".join(lines).rstrip() + "\n"
