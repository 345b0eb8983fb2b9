"""What the tables of peers say of seconds that were measured: who is fastest, and what a page shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import kind_of
from benchmarks.peers.page import short_table
from benchmarks.peers.peers import best
from benchmarks.report import ENGINE_CHANGED, PEERS_BEGIN, PEERS_END, age_lines, put_table

# Two rounds, in which a program with as many seconds in one is slower in the other.
SECONDS = {
    "fastgpt2": {"alone": [2.0, 2.0], "8": [4.0, 4.0]},
    "fastgpt2-drafts-int8": {"alone": [1.0, 1.0], "8": [5.0, 5.0]},
    "fastgpt2-int8": {"alone": [0.5, 0.7], "8": [3.0, 3.0]},
    "llama.cpp-f32": {"alone": [3.0, 3.0], "8": [8.0, 6.0]},
    "openvino-int8": {"alone": [0.6, 0.6], "8": [2.0, 1.0]},
    "llama.cpp-q8_0": {"alone": [0.4, 0.9], "8": [9.0, 9.0]},
}


def test_the_fastest_are_found_among_float32_and_among_fewer_bits() -> None:
    assert best(SECONDS) == {
        "float32": {
            "alone": {"ours": "fastgpt2-drafts-int8", "peer": "llama.cpp-f32", "ratio": 3.0},
            "8": {"ours": "fastgpt2", "peer": "llama.cpp-f32", "ratio": 1.75},
        },
        "compact": {
            # Ours / the peer's in each round: 0.6 / 0.5 = 1.2 and 0.6 / 0.7.
            "alone": {"ours": "fastgpt2-int8", "peer": "openvino-int8", "ratio": (1.2 + 0.6 / 0.7) / 2},
            "8": {"ours": "fastgpt2-int8", "peer": "openvino-int8", "ratio": 0.5},
        },
    }


def test_without_peers_nobody_is_compared() -> None:
    assert best({name: found for name, found in SECONDS.items() if name.startswith("fastgpt2")}) == {}


def test_a_page_gets_the_table_between_its_two_lines_and_nowhere_else(tmp_path: Path) -> None:
    def program(ms: float, rate: float, version: str) -> dict[str, Any]:
        return {
            "version": version,
            "ms_per_token": {"median": ms},
            "batches": {"8": {"tokens_per_s": {"median": rate}}},
            "prefill": {"ms": {"median": 100 * ms}},
            "same_ids": {"equal": 9, "sequences": 10},
        }

    result = {
        "machine": {"cpu": "CPU", "date": "2026-11-30 09:00 UTC", "system": "Linux x86_64", "blas": "openblas-Zen"},
        "models": [
            {
                "threads": 2,
                "prefill_tokens": 512,
                "bandwidth_gb_per_s": {"median": 31.2},
                "peers": {
                    "fastgpt2": program(20.04, 300.4, "fastgpt2 0.1.0"),
                    "transformers": program(40.0, 100.0, "transformers 5.24.0, torch 2.14.1"),
                    "fastgpt2-int8": program(6.0, 500.0, "fastgpt2 0.1.0"),
                    "openvino-int8": program(8.0, 700.0, "OpenVINO GenAI 2026.4.1.0"),
                },
            }
        ],
    }
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text(f"before\n{PEERS_BEGIN}\nold\n{PEERS_END}\nafter\n", "utf-8")
    other.write_text("no table\n", "utf-8")
    for path in (page, other):
        put_table(path, short_table(result))
    assert other.read_text("utf-8") == "no table\n"
    lines = page.read_text("utf-8").splitlines()
    assert (lines[:2], lines[-2:]) == (["before", PEERS_BEGIN], [PEERS_END, "after"])
    assert "with AVX2, which read 31 GB/s" in lines[2]
    assert "2026-11-30" in lines[3]
    assert lines[7:-2] == [
        "| *Computed in float32* |  |  |  |  |",
        "| fastgpt2, float32 | **20.0** | **300** | **2004** | 9 of 10 |",
        "| transformers, float32 | 40.0 | 100 | 4000 | 9 of 10 |",
        "| *Computed with fewer bits* |  |  |  |  |",
        "| fastgpt2, int8 | **6.0** | 500 | **600** | 9 of 10 |",
        "| OpenVINO, int8 | 8.0 | **700** | 800 | 9 of 10 |",
        "",
        "Versions: transformers 5.24.0, torch 2.14.1; OpenVINO GenAI 2026.4.1.0.",
    ]


def test_a_machine_is_of_a_kind_by_its_instructions_or_by_its_blas() -> None:
    def kind(blas: str, *instructions: str, system: str = "Linux 6.1 x86_64") -> str:
        return kind_of({"system": system, "blas": blas, "instructions": instructions})

    assert kind("openblas-Haswell", "avx2", "avx512f") == "avx512"
    assert kind("openblas-Haswell", "avx2") == "avx2"
    assert kind("openblas-SkylakeX") == "avx512"  # as older results are
    assert kind("openblas-Zen") == "avx2"
    assert kind("openblas-Nehalem") == "other"
    assert kind("openblas-neoversen1", "asimd", "asimddp", system="Linux 6.1 aarch64") == "arm"
    assert kind("accelerate", system="Darwin 24.1 arm64") == "arm"


def test_figures_of_an_older_engine_say_so() -> None:
    def lines(benchmark: str, date: str) -> list[str]:
        return age_lines({"benchmark": benchmark, "machine": {"date": f"{date} 09:00 UTC"}})

    assert lines("peers", "2026-11-25") == [f"Measured before {ENGINE_CHANGED}, since when steps are faster.", ""]
    assert lines("peers", ENGINE_CHANGED) == []
    assert lines("endpoint", "2026-11-25") == []
