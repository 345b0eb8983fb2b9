"""What an image takes to pull: its layers as a registry keeps them, compressed, and which of them its base has already.

    python tools/image_size.py fastgpt2 --base python:3.11.14-slim-bookworm

Layers are compressed by gzip at its default level, as `docker push` does. Needs the `docker` command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Layer:
    """Sizes in bytes, and the command that made it."""

    digest: str
    command: str
    plain: int
    compressed: int


def layers(image: str) -> list[Layer]:
    """The layers of an image that the local daemon has, the base's first."""
    if ":" not in image.rpartition("/")[2]:
        image += ":latest"  # a name without a tag would be all of its images
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "image.tar"
        subprocess.run(["docker", "save", "--output", str(archive), image], check=True)
        with tarfile.open(archive) as tar:
            (manifest,) = _json(tar, "manifest.json")
            config = _json(tar, manifest["Config"])
            commands = [step.get("created_by", "") for step in config["history"] if not step.get("empty_layer")]
            found = []
            for name, digest, command in zip(manifest["Layers"], config["rootfs"]["diff_ids"], commands, strict=True):
                file = tar.extractfile(name)
                assert file is not None
                found.append(Layer(digest, command, *_sizes(file)))
    return found


def _json(tar: tarfile.TarFile, name: str) -> Any:
    file = tar.extractfile(name)
    assert file is not None
    return json.load(file)


def _sizes(file: IO[bytes]) -> tuple[int, int]:
    packer = zlib.compressobj(wbits=31)
    plain = compressed = 0
    while chunk := file.read(CHUNK_BYTES):
        plain += len(chunk)
        compressed += len(packer.compress(chunk))
    return plain, compressed + len(packer.flush())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--base", required=True, help="the image that its Dockerfile is FROM")
    options = parser.parse_args()
    based_on = {layer.digest for layer in layers(options.base)}
    totals = dict.fromkeys(("base", "added"), (0, 0))
    for layer in layers(options.image):
        kind = "base" if layer.digest in based_on else "added"
        print(f"{kind:6} {layer.plain / 1e6:8.1f} {layer.compressed / 1e6:8.1f} MB  {layer.command[:80]}")
        totals[kind] = totals[kind][0] + layer.plain, totals[kind][1] + layer.compressed
    for kind, (plain, compressed) in totals.items():
        print(f"{kind}: {plain / 1e6:.1f} MB, compressed {compressed / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
