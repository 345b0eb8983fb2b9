"""The peers as pages show them: a section with quartiles in docs/results.md, and a short table for those who choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common import KINDS, kind_of
from benchmarks.peers import servers
from benchmarks.peers.peers import PEERS, is_compact
from benchmarks.tables import COLORS, Draw, markdown, spread
from fastgpt2.bench import Values

# What people call them, where that is not their name in `peers.py`.
PROGRAMS = {"ctranslate2": "CTranslate2", "openvino": "OpenVINO"}
OURS = {
    "fastgpt2": "float32",
    "fastgpt2-drafts-auto": "float32 with drafts",
    "fastgpt2-drafts-int8": "float32 with int8 drafts",
    "fastgpt2-bfloat16": "bfloat16",
    "fastgpt2-int8": "int8",
}
WHOLE = {"float32": "Computed in float32", "compact": "Computed with fewer bits"}


def section(name: str, entry: Values, draw: Draw) -> list[str]:
    """Return the lines about ours beside the peers."""
    found = entry["peers"]
    batches = list(next(iter(found.values()))["batches"])
    headers = ["", "ms/token alone", *(f"tokens/s, {batch} together" for batch in batches)]
    headers += [f"ms to the first token of {entry['prefill_tokens']}", "import + load, ms", "sequences with our ids"]
    rows = []
    for peer, e in found.items():
        drafted = e.get("drafts", {}).get("drafted")
        taken = f"; {e['drafts']['accepted'] / drafted:.0%} of guesses taken" if drafted else ""
        cells = [f"{peer} ({e['version']}{taken})", f"{spread(e['ms_per_token'])}; {e['ratio']:.2f}"]
        for batch in batches:
            b = e["batches"][batch]
            cells.append(f"{spread(b['tokens_per_s'], 0)}; {1 / b['ratio']:.2f}")
        cells.append(f"{spread(e['prefill']['ms'], 0)}; {e['prefill']['ratio']:.2f}")
        cells.append(f"{e['import_ms']['median'] + e['load_ms']['median']:.0f}")
        rows.append([*cells, f"{e['same_ids']['equal']} of {e['same_ids']['sequences']}"])
    rate = entry["bandwidth_gb_per_s"]
    lines = [f"Memory, read by {entry['threads']} processes between the turns: {spread(rate, 1)} GB/s.", ""]
    lines += [*markdown(headers, rows), "", "After a semicolon: the same, divided by ours in float32.", ""]
    lines += best_lines(entry)
    for peer, reason in entry["skipped"].items():
        lines += [f"{peer} was not measured: {reason}.", ""]

    def bars(figure: Any) -> None:
        charts = [("ms a token, alone", [e["ms_per_token"]["median"] for e in found.values()])]
        charts += [
            (f"tokens/s, {batch} together", [e["batches"][batch]["tokens_per_s"]["median"] for e in found.values()])
            for batch in batches
        ]
        charts.append(
            (f"ms, prompt of {entry['prefill_tokens']}", [e["prefill"]["ms"]["median"] for e in found.values()])
        )
        colors = [COLORS[len(OURS) if peer in PEERS else list(OURS).index(peer)] for peer in found]
        for i, (axes, (title, values)) in enumerate(
            zip(figure.subplots(1, len(charts), sharey=True), charts, strict=True)
        ):
            axes.barh(range(len(values)), values, color=colors)
            axes.set_title(title, fontsize="small")
            axes.tick_params(labelsize="small")
            if i == 0:
                axes.set_yticks(range(len(values)), list(found))
                axes.invert_yaxis()

    return [*lines, draw(f"{name}-all", f"{entry['model']}: peers, {entry['threads']} threads", bars), ""]


def servers_section(_name: str, entry: Values, _draw: Draw) -> list[str]:
    """Return the lines about servers over HTTP."""
    about = f"{entry['clients']} clients, {entry['requests']} requests of {entry['tokens']} new tokens"
    lines = [f"{about}; {entry['threads']} threads each.", "", *markdown(*servers.table_of(entry)), ""]
    for name, reason in entry["skipped"].items():
        lines += [f"{name} was not measured: {reason}.", ""]
    return lines


def best_lines(entry: Values) -> list[str]:
    """Return the table of the fastest of ours and the fastest peer in each cell, and how far apart they are."""
    rows = []
    for kind, cells in entry.get("best", {}).items():
        for cell, e in cells.items():
            rows.append([WHOLE[kind], cell_name(cell, entry), e["ours"], e["peer"], f"{e['ratio']:.2f}"])
    if not rows:
        return []
    return [*markdown(["", "", "fastest of ours", "fastest peer", "times as fast as the peer"], rows), ""]


def cell_name(cell: str, entry: Values) -> str:
    """Return what was timed in a cell."""
    if cell.isdigit():
        return f"{cell} together"
    return "alone" if cell == "alone" else f"first token of {entry['prefill_tokens']}"


def short_table(result: Values) -> list[str]:
    """Return a table of one result for those who choose a program, with its machine and date.

    The fastest of its column is in bold, once for float32 and once for fewer bits.
    """
    entry = result["models"][0]
    facts = result["machine"]
    batches = list(next(iter(entry["peers"].values()))["batches"])
    headers = ["", "ms a token, alone", *(f"tokens/s, {batch} at once" for batch in batches)]
    headers += [f"ms to the first token of {entry['prefill_tokens']}", "texts as in float32"]
    rows = []
    for kind, title in WHOLE.items():
        group = {name: e for name, e in entry["peers"].items() if is_compact(name) == (kind == "compact")}
        cells = {name: figures_of(e) for name, e in group.items()}
        rows.append([f"*{title}*", *[""] * (len(headers) - 1)])
        for name, values in cells.items():
            shown = [f"{x:.1f}" if i == 0 else f"{x:.0f}" for i, (x, _) in enumerate(values)]
            for i, (x, more_is_better) in enumerate(values):
                every = [of_one[i][0] for of_one in cells.values()]
                if x == (max(every) if more_is_better else min(every)):
                    shown[i] = f"**{shown[i]}**"
            same = group[name]["same_ids"]
            rows.append([title_of(name), *shown, f"{same['equal']} of {same['sequences']}"])
    rate = entry["bandwidth_gb_per_s"]["median"]
    return [
        f"gpt2's size (124 million parameters) on {entry['threads']} cores of an {facts['cpu']} with "
        f"{KINDS[kind_of(facts)]}, which read {rate:.0f} GB/s from",
        f"memory; {facts['date'][:10]}. Medians of programs that took turns; in bold the fastest of each group:",
        "",
        *markdown(headers, rows),
        "",
        f"Versions: {'; '.join(dict.fromkeys(e['version'] for name, e in entry['peers'].items() if name in PEERS))}.",
    ]


def figures_of(e: Values) -> list[tuple[float, bool]]:
    """Return a program's medians, each with whether more is better."""
    batches: Mapping[str, Values] = e["batches"]
    return [
        (e["ms_per_token"]["median"], False),
        *((batch["tokens_per_s"]["median"], True) for batch in batches.values()),
        (e["prefill"]["ms"]["median"], False),
    ]


def title_of(name: str) -> str:
    """Return a program's name as people write it, with the kind of its weights."""
    if name in OURS:
        return f"fastgpt2, {OURS[name]}"
    program, _, kind = name.partition("-")
    return f"{PROGRAMS.get(program, program)}, {kind or 'float32'}"
