"""Settings of every test: no data but those that a test makes, and annotations of shapes checked at every call."""

import os
import tempfile

from jaxtyping import install_import_hook


def pytest_configure():
    # Data at hand would decide what a test sees: a run on other data is stale, for one.
    os.environ["EXPVAE_DATA"] = tempfile.mkdtemp(prefix="no-data-")
    install_import_hook("lib", "beartype.beartype")
