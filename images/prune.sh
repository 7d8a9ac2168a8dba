#!/bin/sh
# prune.sh: takes out of /opt/hbm what no image runs of the packages from outside: tests, symbols, tools.
set -eu
site=$(/opt/hbm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Tests, and what only a compiler or a type checker reads.
find "$site" -type d -name tests -prune -exec rm -rf {} +
find "$site" \( -name '*.a' -o -name '*.h' -o -name '*.pyi' -o -name '*.pxd' -o -name '*.pyx' -o -name '*.c' \) -type f -delete
# A terminal shows no source but Python.
find "$site"/pygments/lexers -name '*.py' ! -name __init__.py ! -name _mapping.py ! -name python.py -delete
# onnxruntime: its Python tools and a second copy of the library, for programs in C.
rm -rf "$site"/onnxruntime/transformers "$site"/onnxruntime/tools "$site"/onnxruntime/quantization "$site"/onnxruntime/datasets
rm -f "$site"/onnxruntime/capi/libonnxruntime.so.1*
# Compilers for other machines and languages.
rm -rf "$site"/numba/cuda "$site"/numpy/f2py
# What only onnxruntime's tools import.
rm -rf "$site"/google/protobuf "$site"/google/_upb "$site"/flatbuffers
# Not of packages that carry libraries of other projects beside themselves: those were rewritten when packed, and do not
# survive strip.
for package in aiohttp cryptography frozenlist httptools llvmlite multidict numba orjson propcache pydantic_core uvloop \
        xxhash yaml yarl; do
    if [ -d "$site/$package" ]; then find "$site/$package" -name '*.so' -exec strip --strip-unneeded {} +; fi
done
