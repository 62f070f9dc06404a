"""One profile for hypothesis, one thread for torch: what is compared must not depend on the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# torch's first call takes seconds, so a deadline would fail a test at random.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def pages_without_figures() -> Iterator[None]:
    """Drawing takes longer than the small runs of most tests; what is drawn has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        # the mathematics alone is tested without what a page needs
        with suppress(ImportError):
            from fx_influence.lab.report.figures import NO_FIGURES

            patch.setattr("fx_influence.lab.report.page.drawn", lambda *_: NO_FIGURES)
        yield
