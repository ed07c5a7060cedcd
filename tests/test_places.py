"""Settings that name folders mean the same everywhere, and one that cannot be meant gets one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expvae_book import data, places, runs, weights

REPOSITORY = Path(__file__).resolve().parents[1]
SETTINGS = [
    ("EXPVAE_DATA", data.root, "data"),
    ("EXPVAE_RUNS", runs.root, "runs"),
    ("EXPVAE_CACHE", weights.folder, "~/.cache/expvae"),
]


@pytest.fixture(params=["/", "book"])
def anywhere(request, monkeypatch):
    """Papermill runs in the folder where it is called, Jupyter Book in that of the page."""
    monkeypatch.chdir(REPOSITORY / request.param)


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    return tmp_path / "my home"


@pytest.mark.parametrize(("variable", "place", "default"), SETTINGS)
def test_a_setting_means_the_same_from_any_folder(variable, place, default, anywhere, home, monkeypatch):
    values = {"/else where/x": Path("/else where/x"), "here/x": REPOSITORY / "here/x", "../x": REPOSITORY / "../x"}
    values |= {"~": home, "~/x y": home / "x y", "~root/x": Path("~root/x").expanduser(), "x/~": REPOSITORY / "x/~"}
    for value, expected in values.items():
        monkeypatch.setenv(variable, value)
        assert place() == expected, value
    expected = home / ".cache/expvae" if default.startswith("~") else REPOSITORY / default
    monkeypatch.setenv(variable, "")
    assert place() == expected
    monkeypatch.delenv(variable)
    assert place() == expected


def without_a_home(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.parametrize(("variable", "place", "default"), SETTINGS)
def test_a_home_that_is_not_known_is_named_with_the_variable(variable, place, default, monkeypatch):
    monkeypatch.setenv(variable, "~no-such-user/x")
    with pytest.raises(places.SettingError, match=rf"^{variable} is '~no-such-user/x', and the home ~no-such-user is "):
        place()
    without_a_home(monkeypatch)
    monkeypatch.setenv(variable, "~/x")
    with pytest.raises(ValueError, match=rf"^{variable} is '~/x', and the home ~ is not known here: name the folder$"):
        place()


def test_without_a_home_the_cache_is_nowhere(monkeypatch):
    without_a_home(monkeypatch)
    monkeypatch.delenv("EXPVAE_CACHE", raising=False)
    with pytest.raises(NotADirectoryError):
        weights.folder().mkdir(parents=True)


@pytest.mark.parametrize("below", ["", "further/below"])
@pytest.mark.parametrize(("variable", "place", "default"), SETTINGS[:2])
def test_a_setting_that_names_a_file_is_not_taken_for_an_empty_folder(
    variable, place, default, below, monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / below))
    with pytest.raises(places.SettingError, match=rf"^{variable} must name a folder, and {tmp_path}/file is a file$"):
        place()
    monkeypatch.setenv(variable, str(tmp_path / "absent" / below))
    assert place() == tmp_path / "absent" / below


def test_the_command_that_verifies_says_so_in_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "expvae_book", "verify"],
        env=os.environ | {"EXPVAE_RUNS": str(tmp_path / "file")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"EXPVAE_RUNS must name a folder, and {tmp_path}/file is a file.\n"
