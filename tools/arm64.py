"""Run a command of this repository on an emulated ARM CPU: its tests for correctness, where no ARM machine is at hand.

    .venv/bin/python tools/arm64.py pytest tests/engine/test_decoder.py
    .venv/bin/python tools/arm64.py --cpu max python -m fastgpt2 generate "My name is"

The first use makes a folder with Debian for arm64, its Python and this package's dependencies as wheels for aarch64: in
a minute, and nothing in it is run for that. A command then runs in that folder under QEMU's user emulation, 5 to 30
times slower than here, and starts other programs as it likes. It sees this repository, read-only, as /fastgpt2, and an
ARM /proc/cpuinfo, which LLVM reads. Nothing outside the folder changes: emulation is registered for the command's own
user namespace only.

Needs Linux 6.7 or newer, unprivileged user namespaces, and `apt-get install mmdebstrap qemu-user-static`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("~/.cache/fastgpt2-arm64")

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
# bookworm's own.
PYTHON = "3.11"
DEBIAN_PACKAGES = ("python3", "bash", "coreutils", "libstdc++6", "libgomp1", "procps", "base-files", "tzdata")
# What tests of the engine and of workers need; the rest of the extra `test` is for the page and for manifests. redis-py
# needs async-timeout with bookworm's Python 3.11.2, which is older than the one that pip decides for.
WHEELS = ("async-timeout", "hypothesis", "pytest", "pytest-xdist", "pyyaml", "trustme")
EXTRAS = ("chat", "compact", "guided", "server")
# pip takes exactly these tags, and no older ones by itself.
GLIBC_VERSIONS = ("2014", "_2_17", "_2_24", "_2_26", "_2_27", "_2_28", "_2_31", "_2_34", "_2_35")
PACKAGES = Path(f"usr/local/lib/python{PYTHON}/dist-packages")
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/nonexistent:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
}
PROGRAMS = {"python": "python3", "pytest": "python3 -m pytest", "fastgpt2": "python3 -P -m fastgpt2"}

# A command's environment: these, and of the caller's those whose names begin so.
VARIABLES = (
    "PATH=/usr/local/bin:/usr/bin:/bin",
    "HOME=/root",
    "LANG=C.UTF-8",
    "PYTHONDONTWRITEBYTECODE=1",
    "PYTEST_ADDOPTS=-p no:cacheprovider",
    "HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis",
)
KEPT_VARIABLES = ("FASTGPT2_", "OPENBLAS_", "TEST_")

QEMU = "qemu-aarch64-static"

# QEMU's CPUs: the implementer and the part that LLVM knows a CPU by. `max` has all that QEMU can do; LLVM is told of a
# CPU whose instructions are among these, with those for bfloat16 and for 8-bit matrices.
CPUS = {
    "cortex-a57": (0x41, 0xD07),
    "cortex-a72": (0x41, 0xD08),
    "cortex-a76": (0x41, 0xD0B),
    "neoverse-n1": (0x41, 0xD0C),
    "max": (0x41, 0xD40),  # Neoverse V1
}

# The names that Linux gives the bits of AT_HWCAP and AT_HWCAP2 in /proc/cpuinfo: `arch/arm64/kernel/cpuinfo.c`.
HWCAPS = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4"
    " asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg",
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 dgh"
    " rng bti mte ecv afp rpres mte3",
)

# Of an ELF file for aarch64: what QEMU's own /usr/lib/binfmt.d/qemu-aarch64.conf says.
MAGIC = r"\x7f\x45\x4c\x46\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"

# Prints the two words of capabilities of the CPU that QEMU shows.
ASK_HWCAPS = "import ctypes; get = ctypes.CDLL(None).getauxval; get.restype = ctypes.c_ulong; print(get(16), get(26))"

# Runs in namespaces of its own, with the folder, the repository, the file for /proc/cpuinfo, QEMU's program, and then
# what `env` gets: variables and the command. F: the system opens QEMU here and now, since the folder has none.
INSIDE = f"""
set -eu
folder=$1 repository=$2 cpuinfo=$3 qemu=$4
shift 4
PATH=$PATH:/usr/sbin:/sbin
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
printf '%s' ':qemu-aarch64:M::{MAGIC}:{MASK}:'"$qemu"':OF' > /proc/sys/fs/binfmt_misc/register
mount --rbind /dev "$folder/dev"
mount --rbind /sys "$folder/sys"
mount -t proc none "$folder/proc"
mount --bind "$cpuinfo" "$folder/proc/cpuinfo"
mount --bind "$repository" "$folder/fastgpt2"
mount -o remount,bind,ro "$folder/fastgpt2"
exec chroot "$folder" /usr/bin/env --ignore-environment --chdir=/fastgpt2 "$@"
"""


def main() -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary, epilog="The exit status is the command's.")
    parser.add_argument("--cpu", choices=CPUS, default="neoverse-n1", help="QEMU's CPU; default: %(default)s")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"the arm64 system, made here; default: {FOLDER}")
    parser.add_argument("--repository", type=Path, default=ROOT, help="another clone or work tree to run in than this")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="with its arguments; without it, only make the folder"
    )
    options = parser.parse_args()
    for program, package in ((QEMU, "qemu-user-static"), ("mmdebstrap", "mmdebstrap"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            return fail(f"there is no {program} here: apt-get install {package}")
    # `subprocess.run` then kills what it runs, and with it all that was started there.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    system = System(options.folder.expanduser().absolute(), options.repository.absolute(), options.cpu)
    try:
        if not system.is_made():
            system.make()
        return system.run_with_cpuinfo(options.command) if options.command else 0
    except subprocess.CalledProcessError as reason:
        return fail(f"{reason.cmd[0]} failed with status {reason.returncode}")
    except OSError as reason:
        return fail(str(reason))


def fail(message: str) -> int:
    print(f"arm64.py: {message}", file=sys.stderr)
    return 2


@dataclass(frozen=True, slots=True)
class System:
    """A folder with Debian for arm64, and the repository and the CPU that commands in it see."""

    folder: Path
    repository: Path
    cpu: str

    def is_made(self) -> bool:
        return (self.folder / PACKAGES).is_dir()

    def make(self) -> None:
        """Make Debian's files, extracted and not configured: no program of theirs is run, so none is emulated."""
        print(f"arm64.py: making {self.folder}", file=sys.stderr)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        command = ["mmdebstrap", "--quiet", "--variant=extract", "--mode=chrootless", "--architectures=arm64"]
        command += [f"--include={','.join(DEBIAN_PACKAGES)}", SUITE, str(partial), MIRROR]
        subprocess.run(command, check=True)
        # What the packages' own scripts would have made.
        for name, text in FILES.items():
            (partial / name).write_text(text)
        for name in ("dev", "sys", "proc", "fastgpt2", "tmp", "root", "usr/local/bin"):
            (partial / name).mkdir(parents=True, exist_ok=True)
        for name, words in PROGRAMS.items():
            (partial / "usr/local/bin" / name).write_text(f'#!/bin/bash\nexec {words} "$@"\n')
            (partial / "usr/local/bin" / name).chmod(0o755)
        install_wheels(partial / PACKAGES)
        (partial / PACKAGES / "fastgpt2.pth").write_text("/fastgpt2\n")
        # Fails if there is anything in the folder.
        partial.rename(self.folder)

    def run_with_cpuinfo(self, command: list[str]) -> int:
        """Run a command that sees an ARM machine's /proc/cpuinfo; return its exit status."""
        with tempfile.NamedTemporaryFile("w", prefix="cpuinfo-") as cpuinfo:
            asked = self._run(["python3", "-c", ASK_HWCAPS], cpuinfo.name, stdout=subprocess.PIPE)
            asked.check_returncode()
            cpuinfo.write(describe_cpus(self.cpu, [int(word) for word in asked.stdout.split()]))
            cpuinfo.flush()
            return self._run(command, cpuinfo.name).returncode

    def _run(self, command: list[str], cpuinfo: str, stdout: int | None = None) -> subprocess.CompletedProcess[bytes]:
        kept = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(KEPT_VARIABLES)]
        words = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child"]
        words += ["bash", "-c", INSIDE, "arm64.py"]
        words += [str(self.folder), str(self.repository), cpuinfo, shutil.which(QEMU) or QEMU]
        return subprocess.run([*words, *VARIABLES, f"QEMU_CPU={self.cpu}", *kept, *command], stdout=stdout)


def install_wheels(packages: Path) -> None:
    """Unpack the dependencies' wheels for aarch64, of the versions that constraints.txt has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command += ["--target", str(packages), "--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    command += [f"--platform=manylinux{version}_aarch64" for version in GLIBC_VERSIONS]
    command += [f"--abi={abi}" for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none")]
    command += ["--constraint", str(ROOT / "constraints.txt"), *project["dependencies"], *extras, *WHEELS]
    subprocess.run(command, check=True)


def describe_cpus(cpu: str, hwcaps: list[int]) -> str:
    """Return the text of an ARM machine's /proc/cpuinfo, with the capabilities that its programs are told of."""
    names = [name for words, bits in zip(HWCAPS, hwcaps, strict=True) for name in _set_bits(words.split(), bits)]
    implementer, part = CPUS[cpu]
    lines = (
        "BogoMIPS\t: 50.00",
        f"Features\t: {' '.join(names)}",
        f"CPU implementer\t: {implementer:#04x}",
        "CPU architecture: 8",
        "CPU variant\t: 0x1",
        f"CPU part\t: {part:#05x}",
        "CPU revision\t: 0",
    )
    cpus = range(os.cpu_count() or 1)
    return "".join(f"processor\t: {i}\n" + "\n".join(lines) + "\n\n" for i in cpus)


def _set_bits(names: list[str], bits: int) -> list[str]:
    return [name for i, name in enumerate(names) if bits >> i & 1]


if __name__ == "__main__":
    raise SystemExit(main())
