"""Settings of every test: no data but those that a test makes, and annotations of shapes checked at every call."""

import os
import resource
import shutil
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

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


@pytest.fixture(scope="session")
def html(tmp_path_factory) -> Path:
    """The folder of the real book's pages, built without data and without a GPU."""
    from pages import BOOK, build  # after the hook: it imports the packages

    output = tmp_path_factory.mktemp("book")
    done = build(BOOK, output, EXPVAE_DATA=str(output / "no-data"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-5000:]
    assert "Validation errors" not in done.stdout  # in _config.yml; Jupyter Book goes on without a warning
    return output / "_build" / "html"


@pytest.fixture
def full_disk():
    """A context in which no file can grow beyond some bytes."""

    @contextmanager
    def limited(size=100):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def open_place():
    """A folder that every user can enter, which `tmp_path` is not."""
    folder = Path(tempfile.mkdtemp(prefix="expvae-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def read_only():
    """A context in which a folder with all that it holds can only be read, also where the tests run as root.

    With another mode of folders, it cannot be entered.
    """

    @contextmanager
    def protected(folder, mode=0o555):
        before = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
        for path in reversed(before):
            path.chmod(mode if path.is_dir() else 0o444)
        root = os.geteuid() == 0
        if root:
            os.setresuid(65534, 65534, 0)
        try:
            yield
        finally:
            if root:
                os.setresuid(0, 0, 0)
            for path, mode in before.items():
                path.chmod(mode)

    return protected


@pytest.fixture(params=[0o002, 0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder):
    """What differs from the modes that a umask gives, by path: those of a folder and of all that it holds."""
    mask = os.umask(0)
    os.umask(mask)
    return {
        path: oct(mode)
        for path in [folder, *folder.rglob("*")]
        for mode in [stat.S_IMODE(path.stat().st_mode)]
        if mode != (0o777 if path.is_dir() else 0o666) & ~mask
    }


@pytest.fixture
def odd_modes():
    return modes
