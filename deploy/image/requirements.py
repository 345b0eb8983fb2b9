"""What goes into an image beside fastgpt2, a line each: its dependencies, and MKL where that is asked for."""

import sys
import tomllib
from pathlib import Path

blas = sys.argv[1]
if blas not in ("openblas", "mkl"):
    sys.exit(f"--build-arg BLAS={blas}: is neither openblas nor mkl")
project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
mkl = project["optional-dependencies"]["mkl"] if blas == "mkl" else []
print(*project["dependencies"], *mkl, sep="\n")
