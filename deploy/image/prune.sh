#!/bin/sh
# prune.sh VENV: remove what no container needs, and compile the rest so that two builds of one source are the same.
set -eu
venv=$1
packages=$(echo "$venv"/lib/python3*/site-packages)

# Remove packages' own tests, stubs and headers, and numpy's Fortran wrapper. numpy.testing stays: others import it.
find "$packages" -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} +
find "$packages" -type f \( -name '*.pyi' -o -name '*.pxd' -o -name '*.a' -o -name '*.h' \) -delete
rm -rf "$packages"/numpy/f2py "$packages"/numpy/_pyinstaller "$packages"/numpy/doc "$venv"/bin/f2py "$venv"/bin/numpy-config

# Keep of MKL what dispatches, the interface and threading that fastgpt2 uses, and the kernels of each kind of CPU.
find "$venv"/lib -maxdepth 1 -type f,l ! -name 'libmkl_rt.so*' ! -name 'libmkl_core.so*' \
    ! -name 'libmkl_intel_lp64.so*' ! -name 'libmkl_sequential.so*' ! -name 'libmkl_def.so*' ! -name 'libmkl_mc3.so*' \
    ! -name 'libmkl_avx2.so*' ! -name 'libmkl_avx512.so*' ! -name 'libmkl_avx10.so*' -delete
rm -rf "$venv"/lib/cmake "$venv"/lib/pkgconfig "$venv"/share "$venv"/etc "$venv"/include

# By the content's hash, which is never checked again. Otherwise each compiled file would hold its source's time.
"$venv"/bin/python -m compileall -q --invalidation-mode unchecked-hash "$packages"
