"""One profile for hypothesis, one thread for torch: what is compared must not depend on the machine."""

from __future__ import annotations

import hypothesis
import torch

torch.set_num_threads(1)
# torch's first call takes seconds, so a deadline would fail a test at random.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("default")
