"""Print what goes into an image beside fastgpt2, one a line: its dependencies; MKL, LLVM, OpenTelemetry if asked for.

The extras `chat` and `guided` are in every image: they are 4 MB, and there is no pip in an image to add them later.
"""

import platform
import sys
import tomllib
from pathlib import Path

blas, compact, otel = sys.argv[1:]
if blas not in ("openblas", "mkl"):
    sys.exit(f"--build-arg BLAS={blas}: is neither openblas nor mkl")
if blas == "mkl" and platform.machine() != "x86_64":
    sys.exit(f"--build-arg BLAS=mkl: there is no MKL for {platform.machine()}; leave it out")
if compact not in ("yes", "no"):
    sys.exit(f"--build-arg COMPACT={compact}: is neither yes nor no")
if otel not in ("yes", "no"):
    sys.exit(f"--build-arg OTEL={otel}: is neither yes nor no")
project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
extras = ["chat", "guided"]
asked = (("mkl", blas == "mkl"), ("compact", compact == "yes"), ("otel", otel == "yes"))
extras += [name for name, wanted in asked if wanted]
print(*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name]), sep="\n")
