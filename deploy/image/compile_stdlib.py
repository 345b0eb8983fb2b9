"""compile_stdlib.py OUT: compile the modules of Python's own library that fastgpt2 imports, into OUT/usr/local/lib/...

The official python images come without compiled files, to be small. A container whose root is read-only, or whose user
may not write there, would compile every module again at each start, which takes half a second.
"""

import contextlib
import importlib
import importlib.util
import pkgutil
import py_compile
import sys
import sysconfig
from pathlib import Path
from py_compile import PycInvalidationMode

import fastgpt2

# Modules that the libraries import late, or by name.
OTHERS = (
    "asyncio",
    "concurrent.futures.thread",
    "encodings.idna",
    "huggingface_hub",
    "uvicorn.protocols.http.h11_impl",
)

for name in (*(module.name for module in pkgutil.walk_packages(fastgpt2.__path__, "fastgpt2.")), *OTHERS):
    if not name.endswith("__main__"):
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
library = Path(sysconfig.get_path("stdlib"))
files = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
for file in sorted(file for file in files if file.suffix == ".py" and file.is_relative_to(library)):
    # As prune.sh does for the rest: by the content's hash, which is never checked again.
    compiled = sys.argv[1] + importlib.util.cache_from_source(str(file))
    py_compile.compile(str(file), compiled, doraise=True, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
print(f"{len(files)} modules", file=sys.stderr)
