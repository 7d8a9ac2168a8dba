#!/bin/sh
# prune.sh NAME: takes out of /opt/hbm what an image does not run: pip, tests, symbols, byte code.
set -eu
site=$(/opt/hbm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -rf "$site"/pip "$site"/pip-* "$site"/setuptools* "$site"/_distutils_hack "$site"/distutils-precedence.pth "$site"/pkg_resources /opt/hbm/bin/pip*
# Tests of other packages, and what only a compiler or a type checker reads.
find "$site" -type d -name tests -prune -exec rm -rf {} +
find "$site" \( -name '*.a' -o -name '*.h' -o -name '*.pyi' -o -name '*.pxd' -o -name '*.pyx' -o -name '*.c' \) -type f -delete
find "$site" -type d -name __pycache__ -prune -exec rm -rf {} +
# A terminal shows no source but Python.
find "$site"/pygments/lexers -name '*.py' ! -name __init__.py ! -name _mapping.py ! -name python.py -delete
# Of our own packages only those of this image.
case "$1" in
    operator)
        keep="hbm_cli hbm_kube hbm_operator"
        modules="hbm_cli.main, hbm_operator.controller.process, hbm_operator.webhook.server" ;;
    sidecar)
        keep="hbm_cli hbm_kube hbm_pool hbm_policy hbm_sidecar"
        modules="hbm_cli.main, hbm_sidecar.launch, hbm_sidecar.supervisor, hbm_sidecar.admin, hbm_sidecar.decide, hbm_sidecar.twin, hbm_sidecar.prepare, hbm_sidecar.explain, onnxruntime" ;;
    router)
        keep="hbm_cli hbm_kube hbm_pool hbm_router"
        modules="hbm_cli.main, hbm_router.server" ;;
    server)
        keep="hbm_cli hbm_pool hbm_serving"
        modules="hbm_cli.main, hbm_serving.server" ;;
    *) echo "unknown image $1" >&2; exit 2 ;;
esac
for package in "$site"/hbm_*; do
    name=$(basename "$package")
    case "$name" in *.dist-info) continue ;; esac
    case " $keep " in *" $name "*) ;; *) rm -rf "$package" ;; esac
done
if [ "$1" = sidecar ]; then
    # onnxruntime: its Python tools and a second copy of the library, for programs in C.
    rm -rf "$site"/onnxruntime/transformers "$site"/onnxruntime/tools "$site"/onnxruntime/quantization "$site"/onnxruntime/datasets
    rm -f "$site"/onnxruntime/capi/libonnxruntime.so.1*
    # Compilers for other machines and languages.
    rm -rf "$site"/numba/cuda "$site"/numpy/f2py
    # The libraries that wheels carry beside themselves do not survive strip: they were rewritten when packed.
    strip --strip-unneeded "$site"/llvmlite/binding/libllvmlite.so "$site"/xxhash/*.so "$site"/yaml/*.so "$site"/aiohttp/*.so
fi
# A layer keeps whole seconds: numba compares the time of a source with the one it compiled.
find "$site" -name '*.py' -exec touch -d @1700000000 {} +
# Byte code of what is imported, and of that alone: a start takes a third of the time.
/opt/hbm/bin/python -c "import $modules"
