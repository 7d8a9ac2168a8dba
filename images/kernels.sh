#!/bin/sh
# kernels.sh: compiles the twin's kernels into /opt/hbm/kernels, from sources where and as old as an image has them:
# numba finds what it has compiled by both.
set -eu
site=$(/opt/hbm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mv hbm_pool hbm_policy hbm_sidecar "$site" # not a copy: Python would take the one that lies here
find "$site"/hbm_* -name '*.py' -exec touch -d @1700000000 {} +
/opt/hbm/bin/python -m hbm_sidecar.kernels /opt/hbm/kernels
