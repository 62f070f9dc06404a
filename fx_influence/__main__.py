"""``python -m fx_influence``: the command line, by name, since the mathematics beside this imports no lab."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("fx_influence.lab.cli", run_name="__main__")
