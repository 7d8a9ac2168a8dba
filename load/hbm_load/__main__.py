"""`python -m hbm_load`."""

from hbm_load.cli import app

app(prog_name="python -m hbm_load")
