"""Take the picture of the page in docs/endpoint.md: the whole system under a changing load, in a real Chromium.

    python tools/screenshot_page.py                      # 16 minutes, for curves over all of the charts' 15
    python tools/screenshot_page.py --seconds 60 --output /tmp

The script writes page.png and page-dark.png. It needs Debian's chromium, or another on PATH, and the `test` extra.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, expect, sync_playwright

from fastgpt2 import Client, settings
from fastgpt2.protocol.keys import workers_key
from fastgpt2.system.up import System

PROMPTS = ["Sherlock Holmes", "It was a cold morning", "To be, or not to be", "ROMEO:\n", "The letter was written"]
# The number of jobs at once, as a part of those that the workers have room for; the others wait. Each level lasts for
# `LEVEL_SECONDS`, over and over.
LOAD_LEVELS = (0.02, 0.1, 0.3, 0.5, 0.8, 1.0, 1.2, 1.4, 1.1, 0.7, 0.4, 0.15)
LEVEL_SECONDS = 20.0


def put_load(redis_url: str, room: int, stopping: threading.Event, seed: int = 3) -> None:
    """Keep as many jobs in the system as the levels say, until told to stop. `room`: how many the workers hold."""
    rng = random.Random(seed)

    def prompts(until: float) -> Iterator[str]:
        while time.monotonic() < until and not stopping.is_set():
            yield rng.choice(PROMPTS)

    with Client(redis_url) as client:
        for level in itertools.cycle(LOAD_LEVELS):
            if stopping.is_set():
                return
            coming = prompts(time.monotonic() + LEVEL_SECONDS)
            in_flight = max(1, round(level * room))
            for _ in client.as_completed(coming, in_flight=in_flight, max_new_tokens=150, ignore_eos=True):
                pass


def count_room(redis_url: str, queue: str) -> int:
    """Return how many jobs the workers decode at once."""
    with Client(redis_url, queue) as client:
        workers = client.connection.smembers(workers_key(queue))
        return sum(int(client.connection.hget(name, "max_batch") or 0) for name in workers)


def take_picture(page: Page, path: Path) -> None:
    """Take a picture of the page with an answer, while jobs wait."""
    page.get_by_role("textbox", name="Prompt").fill("Once upon a time")
    page.get_by_label("At most").fill("90")
    expect(page.locator("#state")).to_contain_text(re.compile(r"[1-9]\d*\swaiting"), timeout=10 * LEVEL_SECONDS * 1000)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#answer-end")).to_contain_text("tokens/s", timeout=60_000)
    expect(page.locator("#jobs td", has_text="finished").first).to_be_visible()
    page.mouse.click(1, 1)  # to have no focus ring in the picture
    page.screenshot(path=path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=960.0, help="seconds of load before the picture (default: %(default)g)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/img"), help="the folder for the pictures (default: %(default)s)"
    )
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("there is no chromium on PATH: apt-get install chromium")
    values = settings.of_system(model="demo", workers="2", port="0", redis_port="0", log_level="warning")
    stopping = threading.Event()
    with System(values) as system, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        room = count_room(system.redis_url, values["queue"])
        load = threading.Thread(target=put_load, args=(system.redis_url, room, stopping))
        load.start()
        try:
            stopping.wait(args.seconds)
            schemes: dict[Literal["light", "dark"], str] = {"light": "page.png", "dark": "page-dark.png"}
            for scheme, name in schemes.items():
                page = browser.new_page(viewport={"width": 1280, "height": 950}, device_scale_factor=1.2)
                page.emulate_media(color_scheme=scheme)
                page.goto(system.http_url)
                take_picture(page, args.output / name)
                page.close()
        finally:
            stopping.set()
            load.join()
            browser.close()


if __name__ == "__main__":
    main()
