"""Compiled operations as machine code: made by LLVM once for a CPU, kept in the user's cache, mapped by each process.

To import LLVM and to compile takes a few tenths of a second. So the code is kept as Python keeps its .pyc files, under
a name that is a hash of all that it depends on: the source that writes it, what it is specialized for, the version of
LLVM and the CPU. A process that finds it maps it, and never imports LLVM.

Machine code can do whatever the process can. So a file is used only if it belongs to this process's user, nobody else
may read or write it, nobody else could put another in its place (`trust.py`), and its bytes have the hash that it was
written with. Where no file can be kept, each process compiles for itself, and its helpers map what it has compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import logging
import mmap
import os
import platform
import stat
import struct
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgpt2.engine.machine import anonymous_file, cache_folder, user_cache_folder
from fastgpt2.engine.trust import NotTrusted, check_folder, create_file, make_folder, open_trusted
from fastgpt2.errors import BadRequest

if TYPE_CHECKING:
    from fastgpt2.engine.kernels.instruction_set import InstructionSet
    from fastgpt2.engine.kernels.ir import Module
    from fastgpt2.engine.kernels.object_file import Image

log = logging.getLogger("fastgpt2.engine")

# Part of what is hashed: a release that keeps its files in another way looks for other names.
_FORMAT = 1
SUFFIX = ".code"
# A file: the hash of what follows, the length of the header, the header, zeros up to a page, the code.
_MAX_FILE_BYTES = 16 << 20
# A file has some tens of KB; a model needs four of them.
_MOST_FILES = 200

_CPU_FILE = Path("/proc/cpuinfo")

# What writes the operations of one unit, for an instruction set.
Writer = Callable[["Module", "InstructionSet"], None]


class MachineCode:
    """The operations of one unit, ready to be called.

    Attributes:
        instructions: the name of the instruction set that they are written for.
        fd: a descriptor of the file that they are mapped from, for helpers; None if they are LLVM's own.
    """

    def __init__(self, addresses: dict[str, int], instructions: str, keep: Any, fd: int | None = None) -> None:
        self._addresses, self.instructions, self.fd = addresses, instructions, fd
        self._keep = keep  # the memory that the code lies in

    def address(self, name: str) -> int:
        return self._addresses[name]


def is_installed() -> bool:
    """Tell whether llvmlite is there to import. Imports nothing."""
    return importlib.util.find_spec("llvmlite") is not None


_loaded: dict[str, MachineCode] = {}
_given: dict[str, str] = {}


def give(files: dict[str, str]) -> None:
    """Have units be mapped from files that the process which started this one has open, by `describe_for_helpers`."""
    _given.update(files)


def describe_for_helpers() -> dict[str, str]:
    """Return the paths of this process's descriptors of all units that it has loaded, by their keys."""
    return {key: f"/proc/{os.getpid()}/fd/{code.fd}" for key, code in _loaded.items() if code.fd is not None}


def load_code(unit: str, write: Writer) -> MachineCode:
    """Return the operations of a unit, compiled for this CPU now or before.

    Args:
        unit: its name, with all that `write` depends on beside the source of this folder.

    Raises:
        BadRequest: llvmlite is not installed, or cannot be used.
    """
    key = _key_of(unit)
    code = _loaded.get(key)
    if code is None:
        code = _loaded[key] = _map_given(key) or _map_kept(key) or _compile_and_keep(unit, key, write)
    return code


def _map_given(key: str) -> MachineCode | None:
    if key not in _given:
        return None
    try:
        return _map(os.open(_given[key], os.O_RDONLY | os.O_CLOEXEC))
    except (OSError, ValueError) as reason:
        log.debug("compiled code of the first process is not used: %s", reason)
        return None


def _map_kept(key: str) -> MachineCode | None:
    """Return the code from a cache, if it is there and nobody else can have written it."""
    for folder in _folders():
        path = folder / f"{key}{SUFFIX}"
        try:
            if path.exists():
                return _map(_open_own(path))
        except (OSError, NotTrusted, ValueError) as reason:
            log.debug("compiled code that was kept is not used: %s", reason)
    return None


def _folders() -> list[Path]:
    """Return the folders that code may be kept in: in the user's own cache, else beside the packed weights.

    There are none where the system does not tell what the CPU is: code for another one would end the process.
    """
    if not _CPU_FILE.exists():
        return []
    found = []
    for find in (user_cache_folder, cache_folder):
        with contextlib.suppress(OSError):
            found.append(find() / "code")
    return list(dict.fromkeys(found))


def _open_own(path: Path) -> int:
    """Return the descriptor of a file that this process's user alone may read and write; raise NotTrusted otherwise."""
    check_folder(path.parent)
    fd = open_trusted(path)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(fd)
        raise NotTrusted(f"{path}: not this user's alone")
    return fd


def _map(fd: int) -> MachineCode:
    """Map a file; the descriptor is the result's from now on. Raises ValueError if the file is damaged."""
    try:
        size = os.fstat(fd).st_size
        if not mmap.PAGESIZE < size <= _MAX_FILE_BYTES:
            raise ValueError("damaged: its size")
        mapped = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)
        digest, (length,) = mapped[:32], struct.unpack("<Q", mapped[32:40])
        if hashlib.sha256(memoryview(mapped)[32:]).digest() != digest:
            raise ValueError("damaged: its hash")
        header = json.loads(mapped[40 : 40 + length])
    except BaseException:
        os.close(fd)
        raise
    view = np.frombuffer(mapped, np.uint8)
    begin = view.ctypes.data + header["code_at"]
    addresses = {name: begin + offset for name, offset in header["offsets"].items()}
    return MachineCode(addresses, header["instructions"], (view, mapped, _Descriptor(fd)), fd)


class _Descriptor:
    """A file descriptor that is closed with this object."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:
        os.close(self._fd)


def _to_file(image: Image, instructions: str) -> bytes:
    """Return the content of a file: the hash of what follows, the length of the header, the header, the code."""
    # The code begins at a page, behind the header, which tells where.
    room = len(json.dumps([instructions, image.offsets])) + 100
    code_at = -(-room // mmap.PAGESIZE) * mmap.PAGESIZE
    text = json.dumps({"instructions": instructions, "offsets": image.offsets, "code_at": code_at}).encode()
    body = struct.pack("<Q", len(text)) + text
    body += bytes(code_at - 32 - len(body)) + image.code
    return hashlib.sha256(body).digest() + body


def _compile_and_keep(unit: str, key: str, write: Writer) -> MachineCode:
    from fastgpt2.engine.kernels.object_file import NotLinkable, link

    started = perf_counter()
    compiler = Compiler()
    data = compiler.compile(write)
    try:
        code = _keep(key, _to_file(link(data), compiler.instructions.name))
    except (NotLinkable, OSError, ValueError) as reason:
        log.debug("compiled code stays in LLVM's memory: %s", reason)
        code = compiler.load(data)
    log.debug("compiled %s for %s in %.2f s", unit, code.instructions, perf_counter() - started)
    return code


def _keep(key: str, content: bytes) -> MachineCode:
    """Return the code of a file with this content: in a cache that it can be run from, else in memory."""
    for folder in _folders():
        try:
            return _map(_write(folder, key, content))
        except (OSError, NotTrusted) as reason:
            log.debug("compiled code is not kept in %s: %s", folder, reason)
    fd = anonymous_file("fastgpt2-code")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    return _map(fd)


def _write(folder: Path, key: str, content: bytes) -> int:
    """Write a file for this user alone, and return a descriptor of it. Raises OSError, or NotTrusted."""
    path = folder / f"{key}{SUFFIX}"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    make_folder(folder)
    check_folder(folder)
    try:
        with os.fdopen(create_file(temporary, 0o600), "wb") as file:
            file.write(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _remove_oldest(folder)
    return _open_own(path)


def keep_beside_weights() -> None:
    """Keep all that this process has loaded beside the packed weights too: they may be all that a worker can see."""
    with contextlib.suppress(OSError, NotTrusted):
        folder = cache_folder() / "code"
        if folder not in _folders():
            return
        for key, code in _loaded.items():
            if code.fd is not None and not (folder / f"{key}{SUFFIX}").exists():
                os.close(_write(folder, key, os.pread(code.fd, _MAX_FILE_BYTES, 0)))


def _remove_oldest(folder: Path) -> None:
    """Remove what was written first, if there is more than `_MOST_FILES`: of older releases, LLVMs and CPUs."""
    files = sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-_MOST_FILES]:
        file.unlink(missing_ok=True)


class Compiler:
    """LLVM, for an instruction set.

    Args:
        instructions: None for the best one of this CPU.
        features: of the CPU that is compiled for, as LLVM writes them; None for those of this CPU.
        triple: of another kind of CPU.

    Attributes:
        features: of this CPU, by LLVM's names.

    Raises:
        BadRequest: llvmlite is not installed, or is too old.
    """

    def __init__(
        self, instructions: InstructionSet | None = None, features: str | None = None, triple: str | None = None
    ) -> None:
        try:
            import llvmlite.binding as llvm
        except ImportError as reason:
            raise BadRequest(f"compiled operations need llvmlite ({reason}): pip install 'fastgpt2[compact]'") from None
        from fastgpt2.engine.kernels.instruction_set import instruction_set_of

        self._llvm = llvm
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        if triple is not None:
            llvm.initialize_all_targets()
            llvm.initialize_all_asmprinters()
        own = llvm.get_host_cpu_features()
        self.features = {name for name, there in own.items() if there}
        self.instructions = instructions or instruction_set_of(self.features)
        target = llvm.Target.from_triple(triple or llvm.get_process_triple())
        self._machine = target.create_target_machine(
            # A name brings features of its own.
            cpu=llvm.get_host_cpu_name() if features is None else "",
            features=own.flatten() if features is None else features,
            opt=3,
            reloc="pic",
            codemodel="small",
        )

    def compile(self, write: Writer) -> bytes:
        """Return the object file of what `write` writes."""
        object_file: bytes = self._machine.emit_object(self._parse(write))
        return object_file

    def assembly(self, write: Writer) -> str:
        text: str = self._machine.emit_assembly(self._parse(write))
        return text

    def _parse(self, write: Writer) -> Any:
        from fastgpt2.engine.kernels.ir import Module

        module = Module(self.instructions.lanes, self.instructions.x86)
        write(module, self.instructions)
        self.operations = module.operations
        try:
            parsed = self._llvm.parse_assembly(str(module))
            parsed.verify()
        except RuntimeError as reason:
            raise BadRequest(f"this llvmlite cannot be used ({reason}): pip install -U 'fastgpt2[compact]'") from None
        return parsed

    def load(self, data: bytes) -> MachineCode:
        """Load the object file compiled last by LLVM itself, which can link more than `object_file.py`."""
        llvm = self._llvm
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self._machine)
        loaded = llvm.ObjectFileRef.from_data(data)
        engine.add_object_file(loaded)
        engine.finalize_object()
        addresses = {name: engine.get_function_address(name) for name in self.operations}
        return MachineCode(addresses, self.instructions.name, (engine, loaded))


@cache
def _surroundings() -> str:
    """Return all that machine code depends on beside what is compiled: LLVM, the CPU, and the source that writes it."""
    spec = importlib.util.find_spec("llvmlite")
    if spec is None or spec.origin is None:
        raise BadRequest("compiled operations need llvmlite: pip install 'fastgpt2[compact]'")
    digest = hashlib.sha256(f"{_FORMAT} {sys.version} {platform.machine()}".encode())
    for path in (Path(spec.origin).with_name("_version.py"), *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes())
    digest.update(_cpu().encode())
    return digest.hexdigest()


def _cpu() -> str:
    """Return what the system tells of the CPU and its features, "" if nothing."""
    if not _CPU_FILE.exists():
        return ""
    lines = _CPU_FILE.read_text().splitlines()
    told = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(told)))


def _key_of(unit: str) -> str:
    return hashlib.sha256(f"{unit}\n{_surroundings()}".encode()).hexdigest()[:32]


@cache
def caller(address: int) -> Callable[[int], int]:
    """Return a Python function for an operation: it takes the address of the arguments, and returns the status."""
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address)
