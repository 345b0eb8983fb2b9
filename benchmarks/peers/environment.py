#!/usr/bin/env python3
"""Make the peers' environments: FOLDER/venv, in which they run, and FOLDER/export, which writes OpenVINO's models.

    python benchmarks/peers/environment.py FOLDER

The versions are those of `requirements.txt` and `requirements-export.txt` beside this script. llama.cpp is compiled for
this machine, which takes a C++ compiler, CMake and some minutes. Both environments together may take 12 GB, as
torch brings what GPUs need.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = {"venv": "requirements.txt", "export": "requirements-export.txt"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    compiling = {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "-DGGML_NATIVE=ON")}
    for name, requirements in REQUIREMENTS.items():
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        install = [folder / name / "bin" / "pip", "install", "-r", Path(__file__).with_name(requirements)]
        if status := subprocess.run(install, env=os.environ | compiling, check=False).returncode:
            sys.exit(
                f"pip could not install {requirements} into {folder / name}, for the reason above (status {status})"
            )
    print(f"peers.py finds them by --peer-python {folder / 'venv' / 'bin' / 'python'}")


if __name__ == "__main__":
    main()
