"""Build the API reference from the docstrings, into docs/api or a folder given (``make docs``); a warning ends it."""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import fx_influence

OUTPUT = Path(__file__).parent / "api"


def public_modules() -> list[str]:
    """Return the package and every module in it whose path has no private name."""
    names = [module.name for module in pkgutil.walk_packages(fx_influence.__path__, "fx_influence.")]
    return ["fx_influence", *(name for name in names if not any(part.startswith("_") for part in name.split(".")))]


def build(output: Path) -> None:
    """Write one page for each public module into ``output``; raise the first warning."""
    # The package imports its public names when they are first used, and pdoc reads only those that are there.
    for name in fx_influence.__all__:
        setattr(fx_influence, name, getattr(fx_influence, name))
    pdoc.render.configure(docformat="google", footer_text=f"fx_influence {fx_influence.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # pdoc 16.0 resolves annotations of a NamedTuple's generated constructor in the wrong globals.
        warnings.filterwarnings("ignore", r"Error parsing type annotation .*__init__\. Import of", UserWarning)
        # A package's ``__all__`` hides its modules from pdoc, so every module is named, and some are found twice.
        warnings.filterwarnings("ignore", "The module specification .* adds a module named", UserWarning)
        pdoc.pdoc(*public_modules(), output_directory=output)


if __name__ == "__main__":
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    build(output)
    print(f"wrote {output / 'index.html'}")
