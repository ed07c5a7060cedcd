"""Settings of every test: no data but those that a test makes, and annotations of shapes checked at every call."""

import os
import tempfile

import pytest
import torch
from jaxtyping import install_import_hook


def pytest_configure():
    # Data at hand would decide what a test sees: a run on other data answers for nothing, for one.
    os.environ["EXPVAE_DATA"] = tempfile.mkdtemp(prefix="no-data-")
    install_import_hook(["expvae", "expvae_book"], "beartype.beartype")


@pytest.fixture
def one_thread():
    """Sums in another order differ in the last bit: two trainings agree when both use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
