"""Run the command line for ``python -m fx_influence``.

It is run by name, because no module outside of ``lab`` imports ``lab``.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("fx_influence.lab.cli", run_name="__main__")
