#!/usr/bin/env python3
# matplotlib is for this script only, and not in the environment that the checks run in.
# mypy: disable-error-code="import-not-found,import-untyped"
"""The pages docs/results.md and docs/capacity.md, the pictures in docs/img/ and the tables of peers in other pages,
made from the results of the scripts.

    pip install matplotlib
    python benchmarks/report.py                               # reads benchmarks/results/*/*.json

The page has a part for each kind of machines, and each result a section that names its machine and date. Run this
script again after any of the other scripts. With --no-plots it needs no matplotlib: it writes the tables and shows the
pictures that are there already.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone's root, where `benchmarks` is

from benchmarks.capacity import page as capacity_page
from benchmarks.common import HERE, KINDS, RESULTS, kind_of
from benchmarks.engine import guided, sampling
from benchmarks.engine.step_parts import allocation_rows
from benchmarks.peers import page as peers_page
from benchmarks.pool import mixed
from benchmarks.tables import COLORS, Draw, markdown, slug, spread, yes_no
from fastgpt2.bench import Values, machine_line

DOCS = HERE.parent / "docs"
# Between these two lines README.md shows the newest table of peers, and docs/performance.md that of each kind.
PEERS_BEGIN = "<!-- made by benchmarks/report.py from the results of peers/peers.py: do not edit -->"
PEERS_END = "<!-- end -->"
# When all of a step came to be compiled: older figures of these are of slower code.
ENGINE_CHANGED = "2026-11-30"
OF_THE_ENGINE = ("engine", "drafts", "sampling", "guided", "profile", "cold_start", "prefixes", "pool", "peers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="default: docs")
    parser.add_argument("--no-plots", action="store_true", help="draw no pictures")
    asked = parser.parse_args()
    found = [(path.stem, json.loads(path.read_text("utf-8"))) for path in sorted(asked.results.rglob("*.json"))]
    capacity = [result for stem, result in found if stem == "capacity"]
    order, kinds = list(SECTIONS), list(KINDS)
    found = [(stem, result) for stem, result in found if result.get("benchmark") in SECTIONS]
    found.sort(key=lambda item: (kinds.index(kind_of(item[1]["machine"])), order.index(item[1]["benchmark"]), item[0]))
    pictures = asked.docs / "img"
    draw = showing_from(pictures) if asked.no_plots else drawing_into(pictures)
    page = asked.docs / "results.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    text = results_page(found, draw)
    page.write_text(text, "utf-8")
    for path in [] if asked.no_plots else pictures.glob("*.svg"):
        if path.name.partition("-")[0] in KINDS and f"img/{path.name}" not in text:
            path.unlink()  # of a result that is no more
    print(f"{page}: {len(found)} results")
    if capacity:  # a page of its own, for whoever plans a pool
        (asked.docs / "capacity.md").write_text(capacity_page.page(newest(capacity)), "utf-8")
    if peers := [result for _, result in found if result["benchmark"] == "peers"]:
        put_table(asked.docs.parent / "README.md", peers_page.short_table(newest(peers)))
        tables = [line for result in peers for line in (*peers_page.short_table(result), "", *age_lines(result))]
        put_table(asked.docs / "performance.md", tables[:-1])


def newest(results: Sequence[Values]) -> Values:
    """Return the result that was measured last."""
    return max(results, key=lambda result: str(result["machine"]["date"]))


def age_lines(result: Values) -> list[str]:
    """Return the lines that say that a result is of an older engine, [] if it is not."""
    if result["benchmark"] not in OF_THE_ENGINE or result["machine"]["date"] >= ENGINE_CHANGED:
        return []
    return [f"Measured before {ENGINE_CHANGED}, since when steps are faster.", ""]


def put_table(path: Path, lines: Sequence[str]) -> None:
    """Write lines between the two that hold a page's table of peers; a page without them stays as it is."""
    before, begin, rest = path.read_text("utf-8").partition(PEERS_BEGIN) if path.exists() else ("", "", "")
    _, end, after = rest.partition(PEERS_END)
    if begin and end:
        path.write_text("\n".join([f"{before}{begin}", *lines, f"{end}{after}"]), "utf-8")


def results_page(found: Sequence[tuple[str, Values]], draw: Draw) -> str:
    """Return the page of all results, a part for each kind of machines.

    Args:
        found: the name of each result's file, and the result, those of a kind together.
    """
    lines = [
        "# Results\n\nFor everyone who doubts a figure, or wants to compare: all measurements, each with its machine.",
        "",
        "Made by `benchmarks/report.py` from the files in `benchmarks/results/`: do not edit. The head of each script",
        "says what is measured, and how; [benchmarks/README.md](../benchmarks/README.md) says which script to run.",
        "Figures are medians, with quartiles in brackets. Things that are compared took turns in one run,",
        "and ratios are taken within a run.",
        "",
    ]
    if not found:
        lines += ["Nothing has been measured yet.", ""]
    of_kind = ""
    for stem, result in found:
        benchmark, facts = result["benchmark"], result["machine"]
        kind = kind_of(facts)
        if kind != of_kind:
            lines += [f"## Machines with {KINDS[kind]}", ""]
            of_kind = kind
        title, script, section = SECTIONS[benchmark]
        suffix = stem.removeprefix(benchmark).strip("-_")
        lines += [f"### {title} ({', '.join(word for word in (suffix, KINDS[kind]) if word)})", ""]
        lines += [f"{machine_line(facts)}. Script: `benchmarks/{script}`.", ""]
        if facts.get("instructions"):
            lines += [f"Instructions of this CPU that matter here: {', '.join(facts['instructions'])}.", ""]
        if result["options"].get("note"):
            lines += [result["options"]["note"], ""]
        lines += age_lines(result)
        for entry in result["models"]:
            entry["model"] = Path(entry["model"]).name
            name = f"{kind}-{stem}-{slug(entry['model'])}"
            dated = dated_by(f"{KINDS[kind]}, {facts['date'][:10]}", draw)
            lines += [f"#### {entry['model']}", "", *section(name, entry, dated)]
    return "\n".join(lines).rstrip() + "\n"


def dated_by(words: str, draw: Draw) -> Draw:
    """Return a function that draws as `draw` does, with the machine and the date in the title."""
    return lambda name, title, fill: draw(name, f"{title} ({words})", fill)


def engine_lines(name: str, entry: Values, draw: Draw) -> list[str]:
    """Return the lines about steps, prompts and contexts of each engine."""
    rates = ", ".join(f"{n}: {rate['median']:.1f}" for n, rate in entry["bandwidth_gb_per_s"].items())
    lines = [
        f"{entry['step_mb']:.1f} MB of weights a step. Memory, GB/s by number of processes that read: {rates}.",
        "",
    ]
    plain = {e["rows"]: e for e in entry.get("plain", {}).get("decode", [])}
    for e in entry["engines"]:
        lines += [
            f"{e['blas']}, panels {e['panels']}, processes {e['processes']}, batch-invariant {yes_no(e['exact'])}:",
            "",
        ]
        headers = ["sequences together", "ms/step", "tokens/s", "GB/s", "of the bandwidth"]
        headers += ["plain numpy's products / our step"] if plain else []
        rows = []
        for d in e["decode"]:
            cells = [str(d["rows"]), spread(d["ms"]), f"{d['tokens_per_s']:.0f}", f"{d['gb_per_s']:.1f}"]
            cells.append(f"{d['share']['median']:.0%}")
            rows.append([*cells, *([f"{plain[d['rows']]['ratio'][e['asked']]:.2f}"] if plain else [])])
        lines += [*markdown(headers, rows), ""]
        rows = [[str(p["tokens"]), spread(p["ms"], 0), f"{p['tokens_per_s']:.0f}"] for p in e["prefill"]]
        lines += [*markdown(["prompt, tokens", "ms", "tokens/s"], rows), ""]
        for count, contexts in e.get("context", {}).items():
            rows = [[str(c["positions"]), spread(c["ms"])] for c in contexts]
            lines += [*markdown(["context, positions", f"ms/step, sequences: {count}"], rows), ""]

    def tokens_by_rows(axes: Any) -> None:
        for color, e in zip(COLORS, entry["engines"], strict=False):
            rows = [d["rows"] for d in e["decode"]]
            axes.plot(rows, [d["tokens_per_s"] for d in e["decode"]], "o-", color=color, label=f"fastgpt2, {e['blas']}")
        if plain:
            speeds = [n * 1e3 / e["ms"]["median"] for n, e in plain.items()]
            axes.plot(list(plain), speeds, "s--", color=COLORS[-1], label="plain numpy, products only")
        axes.set(xlabel="sequences decoded together", ylabel="tokens/s", ylim=(0, None), xlim=(0, None))
        axes.legend()

    def cost_by_context(axes: Any) -> None:
        curves = [(e["blas"], n, found) for e in entry["engines"] for n, found in e.get("context", {}).items()]
        for color, (blas, n, found) in zip(COLORS * 3, curves, strict=False):
            x = [c["positions"] for c in found]
            axes.plot(x, [c["ms"]["median"] for c in found], "o-", color=color, label=f"{blas}, sequences: {n}")
            axes.fill_between(
                x, [c["ms"]["q1"] for c in found], [c["ms"]["q3"] for c in found], color=color, alpha=0.2, linewidth=0
            )
        axes.set(xlabel="positions attended to", ylabel="ms a step", ylim=(0, None), xlim=(0, None))
        axes.legend()

    lines += [draw(f"{name}-rows", f"{entry['model']}: tokens a second by sequences together", tokens_by_rows), ""]
    if any(e.get("context") for e in entry["engines"]):
        lines += [draw(f"{name}-context", f"{entry['model']}: the cost of a step by context", cost_by_context), ""]
    return lines


def drafts_lines(_name: str, entry: Values, _draw: Draw) -> list[str]:
    """Return the lines about engines that draft and one that does not."""
    rows = []
    for batch, found in entry["batches"].items():
        for how, e in found.items():
            taken = f"{e['accepted'] / e['drafted']:.0%} of {e['drafted']}" if e["drafted"] else ""
            cells = [batch, how, spread(e["ms_per_token"]), f"{e['ratio']:.2f}", taken, f"{e['tokens_per_step']:.2f}"]
            rows.append([*cells, f"{e['same']} of {e['sequences']}"])
    headers = ["sequences", "drafts", "ms/token", "off / it", "guesses taken", "tokens a step", "same texts"]
    return [
        f"{entry['blas']}, processes {entry['processes']}, batch-invariant {yes_no(entry['exact'])}; {entry['tokens']} "
        "tokens a sequence, prompts of 32.",
        "",
        *markdown(headers, rows),
        "",
    ]


def sampling_lines(_name: str, entry: Values, _draw: Draw) -> list[str]:
    """Return the lines about the cost of choosing tokens."""
    rows = [sampling.cells(entry, kind) for kind in entry["ms"]]
    about = (
        f"{entry['batch']} sequences, prompts of {entry['context']} tokens, processes {entry['processes']}, no drafts."
    )
    return [*markdown(["all sequences ask for", "ms/step", "quartiles", "times greedy"], rows), "", about, ""]


def guided_lines(_name: str, entry: Values, _draw: Draw) -> list[str]:
    """Return the lines about grammars."""
    tables = guided.tables(entry)
    return [line for title, headers, rows in tables for line in (f"{title}:", "", *markdown(headers, rows), "")]


def weights_lines(_name: str, entry: Values, _draw: Draw) -> list[str]:
    """Return the lines about the quality of compact weights."""
    rows = []
    for name, e in entry["weights"].items():
        cells = [name, f"{e['mb']:.1f}", f"{e['perplexity']:.2f}", f"{e['agreement']:.2%}", f"{e['difference']:.4f}"]
        rows.append([*cells, f"{e['same_texts']} of {entry['prompts']}", f"{e['same_tokens']:.1f}"])
    headers = ["weights", "MB packed", "perplexity", "likeliest token as float32's", "difference of log probabilities"]
    headers += [f"same texts of {entry['tokens']} tokens", "tokens until they part"]
    return [f"{entry['places']} tokens of held-out text.", "", *markdown(headers, rows), ""]


def step_parts_lines(_name: str, entry: Values, _draw: Draw) -> list[str]:
    """Return the lines about the parts of a step, and what it allocates."""
    times = entry["time"]
    rows = [
        [part, *(f"{t['parts_ms'][part]['median']:.3f}" for t in times)]
        for part in times[0]["parts_ms"]
        if any(t["parts_ms"][part]["median"] for t in times)
    ]
    rows.append(["a step, undisturbed", *(spread(t["step_ms"], 3) for t in times)])
    rows.append(["share of all but products", *(f"{1 - t['products_share']:.1%}" for t in times)])
    lines = [*markdown(["ms, sequences together:", *(str(t["rows"]) for t in times)], rows), ""]
    rows = allocation_rows(entry)
    headers = ["sequences together", "bytes allocated in a step, peak", "held after it", "of it numpy's"]
    return [*lines, *markdown(headers, rows), ""]


def cold_start_lines(name: str, entry: Values, draw: Draw) -> list[str]:
    """Return the lines about whole processes."""
    who = [peer for peer in ("fastgpt2", "transformers", "python") if peer in entry]
    labels = {"python": "`python` that does nothing"}
    keys = {"whole_process": "whole process", "imports": "imports", "ready": "ready", "first_token": "first token"}
    keys |= {"token": "a further token", "total": "in the process"}
    rows = [[text, *(spread(entry[w][k], 1) if k in entry[w] else "" for w in who)] for k, text in keys.items()]
    lines = [*markdown(["ms", *(labels.get(w, w) for w in who)], rows), ""]
    for peer, reason in entry["skipped"].items():
        lines += [f"{peer} was not measured: {reason}.", ""]
    if "ratio" in entry:
        lines += [f"{entry['transformers']['version']} takes {entry['ratio']:.1f} times as long, whole process;"]
        lines += [f"{'the same' if entry['same_text'] else 'another'} text.", ""]

    def bars(axes: Any) -> None:
        seconds = [entry[w]["whole_process"]["median"] / 1e3 for w in who]
        drawn = axes.barh([labels.get(w, w).replace("`", "") for w in who], seconds, color=COLORS[: len(who)])
        axes.bar_label(drawn, fmt="%.2f s", padding=3)
        axes.invert_yaxis()
        axes.set(xlabel="seconds from the command to its end", xlim=(0, max(seconds) * 1.15))

    return [*lines, draw(name, f"{entry['model']}: a whole process, {entry['tokens']} tokens", bars), ""]


def memory_lines(name: str, entry: Values, draw: Draw) -> list[str]:
    """Return the lines about the memory of idle engines."""
    found = entry["engines"]
    parts = {"weights": "weights", "state": "KV cache and activations", "rest": "the rest"}
    rows = []
    for e in found:
        sizes = [f"{e[f'{part}_mb']:.0f}" for part in ("pss", *parts, "private")]
        rows.append([str(e["engines"]), str(e["processes"]), *sizes, f"{e['of_copies']:.0%}"])
    headers = [
        "engines",
        "processes",
        "sum of PSS, MB",
        *parts.values(),
        "private",
        "of what n copies of the weights take",
    ]

    def bars(axes: Any) -> None:
        x = [str(e["engines"]) for e in found]
        bottom = [0.0] * len(x)
        for color, (part, label) in zip(COLORS, parts.items(), strict=False):
            sizes = [e[f"{part}_mb"] for e in found]
            axes.bar(x, sizes, bottom=bottom, color=color, label=label)
            bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
        axes.plot(x, [e["pss_mb"] / e["of_copies"] for e in found], "k_--", label="if each had its own weights")
        axes.set(xlabel="engines", ylabel="MB, sum of PSS", ylim=(0, None))
        axes.legend()

    return [*markdown(headers, rows), "", draw(name, f"{entry['model']}: memory by engines", bars), ""]


def prefixes_lines(_name: str, entry: Values, _draw: Draw) -> list[str]:
    """Return the lines about prompts that begin alike."""
    labels = {
        "without": "nothing kept",
        "with": f"{entry['header']} tokens known, {entry['own']} read",
        "new": "never seen before: read and kept",
    }
    rows = [[text, spread(entry["ms"][key], 1)] for key, text in labels.items()]
    copies = {"copied in": "copies: of what is known", "kept": "of a new prompt", "kept, memory new": "in new memory"}
    rows += [[text, spread(entry["copies_ms"][key], 1)] for key, text in copies.items()]
    length, same = entry["header"] + entry["own"], entry["same_ids"]
    return [
        *markdown([f"a prompt of {length} tokens", "ms to the first token, or of a copy"], rows),
        "",
        f"Processes {entry['processes']}, batch-invariant {yes_no(entry['exact'])}, {entry['block_mb']:.1f} MB a block "
        f"of 32. Time with nothing kept / time with tokens known: {entry['ratio']:.1f}; the same {entry['tokens']} "
        f"tokens for {same['equal']} of {same['prompts']} prompts. To keep a new prompt takes "
        f"{entry['kept_share']:.1%} of the time to read it.",
        "",
    ]


def pool_lines(name: str, entry: Values, draw: Draw) -> list[str]:
    """Return the lines about the pools, and what the queue costs."""
    labels = {
        "one": f"1 worker, up to {entry['pools']['one']['max_batch']} jobs at once",
        "two": "2 workers",
        "single": "1 worker, a job at a time",
        "stock": "stock `rq worker`",
    }
    headers = ["jobs", "prompt tokens", "", "tokens/s", "ms to the first text, p50", "p95", "ms a token, p50", "p95"]
    rows = []
    for cell in entry["cells"]:
        shortest, longest = cell["prompt_tokens"]
        for which, found in cell["pools"].items():
            jobs = min(cell["jobs"], cell["stock_jobs"]) if which == "stock" else cell["jobs"]
            times = [found[of][p]["median"] for of in ("ttft_ms", "tpot_ms") for p in ("p50", "p95")]
            prompts = str(shortest) if shortest == longest else f"{shortest}-{longest}"
            shown = [f"{ms:.0f}" for ms in (*times, found["longest_gap_ms"]["median"])]
            rows.append([str(jobs), prompts, labels[which], spread(found["tokens_per_s"], 1), *shown])
    lines = [f"{entry['tokens']} new tokens a job, all streamed; {entry['pools']['one']['computes_by']}.", ""]
    lines += [*markdown([*headers, "longest gap"], rows), ""]
    pairs = {
        "one/single": "1 worker / a job at a time",
        "one/stock": "1 worker / stock",
        "two/stock": "2 workers / stock",
    }
    ratios = [[jobs, *(f"{found[pair]:.2f}" for pair in pairs)] for jobs, found in entry["ratios"].items()]
    lines += [
        "How many times as many tokens/s, prompts of mixed lengths:",
        "",
        *markdown(["jobs", *pairs.values()], ratios),
        "",
    ]
    ms, redis, alone = entry["overhead"]["ms"], entry["redis"], entry["alone"]
    lines += [
        f"What the queue adds to a job, from the enqueue to the result in the client's hands: {ms['median']:.1f} ms, "
        f"95 of 100 below {ms['p95']:.1f}. The worker's time with Redis, {redis['jobs']} jobs: "
        f"{redis['streamed']['share']['median']:.1%} of the time of its steps with streams, "
        f"{redis['not_streamed']['share']['median']:.1%} without. A lone job takes "
        f"{alone['not_streamed']['token_ratio']:.3f} times as long a token as an engine without a queue, "
        f"{alone['streamed']['token_ratio']:.3f} times with a stream.",
        "",
    ]

    def curves(axes: Any) -> None:
        mixed = [cell for cell in entry["cells"] if not cell["alike"]]
        for color, (which, label) in zip(COLORS, labels.items(), strict=False):
            speeds = [cell["pools"][which]["tokens_per_s"]["median"] for cell in mixed]
            axes.plot([cell["jobs"] for cell in mixed], speeds, "o-", color=color, label=label.replace("`", ""))
        axes.set_xscale("log", base=2)
        axes.set(xlabel="jobs waiting", ylabel="tokens/s", ylim=(0, None))
        axes.set_xticks([cell["jobs"] for cell in mixed], [str(cell["jobs"]) for cell in mixed])
        axes.legend(fontsize="small")

    return [*lines, draw(name, f"{entry['model']}: tokens a second by jobs waiting", curves), ""]


def endpoint_lines(name: str, entry: Values, draw: Draw) -> list[str]:
    """Return the lines about what the endpoint adds, and its streams."""
    over, cells = entry["overhead"], entry["streams"]
    names = {
        "client": "`Client.enqueue(...).result()`",
        "endpoint": "`POST /v1/completions`",
        "added": "what the endpoint adds, request by request",
        "health": "`GET /health`, which asks nobody",
    }
    lines = markdown(["a request of 8 tokens and 1 new one", "ms"], [[names[key], spread(over[key])] for key in names])
    starts = sorted(entry["start"])
    lines += ["", f"From a start to the first answer: {starts[len(starts) // 2]:.0f} ms.", ""]
    lines += markdown(
        [
            "streams at once",
            "events/s",
            "of a core",
            "events/s with a core",
            "ms to the first",
            "ms between two",
            "95%",
        ],
        [
            [
                str(cell["streams"]),
                f"{cell['events'] / cell['seconds']:.0f}",
                f"{cell['cpu_seconds'] / cell['seconds']:.0%}",
                f"{cell['events'] / max(cell['cpu_seconds'], 0.01):.0f}",
                *(f"{cell[key]:.0f}" for key in ("first_ms", "gap_ms", "gap_ms_95")),
            ]
            for cell in cells
        ],
    )

    def curve(axes: Any) -> None:
        axes.plot([c["streams"] for c in cells], [c["events"] / c["cpu_seconds"] for c in cells], marker="o")
        axes.set_xlabel("streams at once")
        axes.set_ylabel("events per second of the endpoint's CPU")
        axes.set_ylim(bottom=0)

    return [*lines, "", draw(name, f"{entry['model']}: what a core of the endpoint passes on", curve), ""]


# In the order of the page, by the name of the benchmark in a result: title, script, and what makes the lines.
SECTIONS: dict[str, tuple[str, str, Callable[[str, Values, Draw], list[str]]]] = {
    "peers": ("Peers", "peers/peers.py", peers_page.section),
    "servers": ("Servers over HTTP", "peers/servers.py", peers_page.servers_section),
    "engine": ("Speed of the engine", "engine/step.py", engine_lines),
    "drafts": ("Drafts", "engine/drafts.py", drafts_lines),
    "sampling": ("How tokens are chosen: cost", "engine/sampling.py", sampling_lines),
    "guided": ("Guided texts", "engine/guided.py", guided_lines),
    "weights": ("Compact weights: quality", "engine/weights.py", weights_lines),
    "profile": ("Where the time of a step goes", "engine/step_parts.py", step_parts_lines),
    "cold_start": ("Cold start", "engine/cold_start.py", cold_start_lines),
    "memory": ("Memory by workers", "engine/memory.py", memory_lines),
    "prefixes": ("Prompts that begin alike", "engine/prefixes.py", prefixes_lines),
    "pool": ("Many jobs at once", "pool/pool.py", pool_lines),
    "mixed": ("Prompts of mixed lengths", "pool/mixed.py", mixed.section),
    "endpoint": ("The endpoint", "endpoint/endpoint.py", endpoint_lines),
}


def drawing_into(folder: Path) -> Draw:
    """Return a function that draws pictures into a folder, by matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    # The same numbers give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "fastgpt2"
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)

    def draw(name: str, title: str, fill: Callable[[Any], None]) -> str:
        whole = name.endswith("-all")  # several charts in one picture: `fill` gets the figure
        figure = Figure(figsize=(10 if whole else 6.4, 3.6), layout="constrained")
        figure.suptitle(title)
        if whole:
            fill(figure)
        else:
            axes = figure.subplots()
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
            fill(axes)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        return picture(name, title)

    return draw


def showing_from(folder: Path) -> Draw:
    """Return a function that draws nothing, and shows the pictures of a folder."""
    return lambda name, title, _fill: picture(name, title) if (folder / f"{name}.svg").exists() else ""


def picture(name: str, title: str) -> str:
    """Return the Markdown that shows a picture."""
    return f"![{title}](img/{name}.svg)"


if __name__ == "__main__":
    main()
