"""The bytes that it takes to pull an image: its layers, compressed as a registry keeps them, and which are its base's.

    python tools/image_size.py fastgpt2 --base python:3.11.14-slim-bookworm

The script compresses layers with gzip at its default level, as `docker push` does. It needs the `docker` command.
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
    """One layer of an image.

    Attributes:
        command: the line of the Dockerfile that made it.
        plain, compressed: sizes in bytes.
    """

    digest: str
    command: str
    plain: int
    compressed: int


def read_layers(image: str) -> list[Layer]:
    """Return the layers of an image that the local daemon has, the base's first."""
    if ":" not in image.rpartition("/")[2]:
        image += ":latest"  # a name without a tag means all images of this name
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "image.tar"
        subprocess.run(["docker", "save", "--output", str(archive), image], check=True)
        with tarfile.open(archive) as tar:
            (manifest,) = _read_json(tar, "manifest.json")
            config = _read_json(tar, manifest["Config"])
            commands = [step.get("created_by", "") for step in config["history"] if not step.get("empty_layer")]
            found = []
            for name, digest, command in zip(manifest["Layers"], config["rootfs"]["diff_ids"], commands, strict=True):
                file = tar.extractfile(name)
                assert file is not None
                found.append(Layer(digest, command, *_measure(file)))
    return found


def _read_json(tar: tarfile.TarFile, name: str) -> Any:
    file = tar.extractfile(name)
    assert file is not None
    return json.load(file)


def _measure(file: IO[bytes]) -> tuple[int, int]:
    """Return the size of a file, plain and compressed, in bytes."""
    packer = zlib.compressobj(wbits=31)
    plain = compressed = 0
    while chunk := file.read(CHUNK_BYTES):
        plain += len(chunk)
        compressed += len(packer.compress(chunk))
    return plain, compressed + len(packer.flush())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="the name of the image, with or without a tag")
    parser.add_argument("--base", required=True, help="the image that its Dockerfile begins FROM")
    options = parser.parse_args()
    based_on = {layer.digest for layer in read_layers(options.base)}
    totals = dict.fromkeys(("base", "added"), (0, 0))
    for layer in read_layers(options.image):
        kind = "base" if layer.digest in based_on else "added"
        print(f"{kind:6} {layer.plain / 1e6:8.1f} {layer.compressed / 1e6:8.1f} MB  {layer.command[:80]}")
        totals[kind] = totals[kind][0] + layer.plain, totals[kind][1] + layer.compressed
    for kind, (plain, compressed) in totals.items():
        print(f"{kind}: {plain / 1e6:.1f} MB, compressed {compressed / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
