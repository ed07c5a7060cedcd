"""The program on endurance with a small share of what it does, and that it finds what is wrong."""

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from expvae_book import checkpoints, files, places, runs


@pytest.fixture(autouse=True)
def importable(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(places.REPOSITORY)
    monkeypatch.chdir(places.REPOSITORY)  # where the processes that it starts look for it
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path / "store"))


def load(name):
    return importlib.import_module(f"benchmarks.endurance{name}")


def test_a_killed_job_ends_with_what_an_undisturbed_one_stores(tmp_path):
    kills = load(".kills")
    counts = kills.measure(tmp_path, 2, ("Boltzmann machine",))
    assert counts["kills"] == 2
    assert counts["jobs"] > 0
    assert counts["lost results"] == counts["different results"] == 0
    assert os.environ["EXPVAE_RUNS"] == str(tmp_path / "store")  # where the numbers are to be stored


def test_a_result_that_is_lost_or_different_is_counted(tmp_path, monkeypatch, capsys):
    kills = load(".kills")
    monkeypatch.setattr(kills, "duration", lambda trainer, folder: 1.0)
    monkeypatch.setattr(kills, "endured", lambda trainer, folder, *_: folder.mkdir() or (1, True))
    results = iter(["expected", "expected", "another", ValueError("there is none")])

    def stored(folder):
        if isinstance(result := next(results), Exception):
            raise result
        return result

    monkeypatch.setattr(kills, "stored", stored)
    counts = kills.measure(tmp_path, 3, ("Boltzmann machine",))
    assert (counts["kills"], counts["lost results"], counts["different results"]) == (3, 1, 1)
    assert "lost: there is none." in capsys.readouterr().err


def test_malformed_inputs_of_every_kind_are_answered_by_a_sentence(tmp_path):
    malformed = load(".malformed")
    counts = malformed.measure(tmp_path, 26)
    assert counts["malformed inputs"] == counts["answered by one sentence"] == 26
    assert counts["silently read as another"] == counts["half-written"] == counts["answered otherwise"] == 0


def test_a_wrong_result_is_counted_as_one(tmp_path, monkeypatch, capsys):
    malformed = load(".malformed")
    monkeypatch.setattr(checkpoints, "_digest", lambda *_: "the same for all")
    flipped = load(".inputs").bytewise("a.checkpoint")
    reader = malformed.inputs.READERS["checkpoint"]._replace(damages=flipped)
    monkeypatch.setattr(malformed.inputs, "READERS", {"checkpoint": reader})
    assert malformed.measure(tmp_path, 20)["silently read as another"] > 0
    assert "checkpoint: a.checkpoint silently read as another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "right"),
    [
        (ValueError("/x/a.png is damaged (it ends)"), True),
        (KeyError("a.png has no entry"), True),
        (ValueError("it is damaged"), False),
        (ValueError("a.png is damaged\nat line 3"), False),
        (ValueError("a.png is damaged. Try again"), False),
        (TypeError("a.png is damaged"), False),
    ],
)
def test_what_is_one_sentence(error, right):
    assert load(".malformed").is_sentence(error, "a.png") == right


def test_a_run_that_two_write_is_of_one_write(tmp_path):
    counts = load(".writers").measure(tmp_path, 1.0)
    assert counts["writes"] > 0
    assert counts["reads"] > 0
    assert counts["corruptions"] == 0


def test_a_mixed_run_is_a_corruption(tmp_path):
    writers = load(".writers")
    for seed in writers.SEEDS:
        run = writers.save(seed, 1)
    assert writers.problem(2) == ""
    runs.amend(run, {"losses": {"kl": [2]}})
    assert writers.problem(2) == "it holds the numbers {1, 2}"
    writers.save(1, 2).folder.rename(run.folder.with_name("seed=3"))
    assert writers.problem(1) == "it is not there"


def test_every_write_site_says_that_there_is_no_room(tmp_path):
    disk = load(".disk")
    counts = disk.measure(tmp_path)
    assert counts["write sites"] == len(disk.SITES) > 10
    assert counts["writes without room"] == 4 * len(disk.SITES)
    assert counts["failures"] == 0


def test_a_file_half_written_is_a_failure(tmp_path, monkeypatch):
    disk = load(".disk")

    def write(folder, number):
        Path(folder, "maps.npy").write_bytes(disk.noise(number).tobytes())

    def written(folder, number):
        with files.replacing(folder / "maps.npy") as temporary:
            temporary.write_bytes(disk.noise(number).tobytes())

    monkeypatch.setattr(disk, "SITES", {"half": write, "whole": written})
    assert disk.measure(tmp_path)["failures"] == 4


def test_all_numbers_become_rows(monkeypatch):
    endurance = load("")
    parts = {"kills": "kills", "malformed": "malformed inputs", "writers": "writes", "disk": "failures"}
    asked = {}
    for name, counted in parts.items():

        def measure(folder, *share, name=name, counted=counted):
            assert os.listdir(folder) == []  # noqa: PTH208
            asked[name] = share
            return {counted: 3}

        monkeypatch.setattr(getattr(endurance, name), "measure", measure)
    sprites, card = endurance.load("sample")
    rows = endurance.measure(sprites, endurance.RECIPE, torch.device("cpu"), 1)
    assert asked == {"kills": (20,), "malformed": (40,), "writers": (pytest.approx(12.0),), "disk": ()}
    assert [(row["subset"], row["metric"], row["value"]) for row in rows] == [
        ("kills", "kills", 3),
        ("malformed inputs", "malformed inputs", 3),
        ("writers", "writes", 3),
        ("full disk", "failures", 3),
    ]
    assert card.generated
    assert np.all([row["low"] is None for row in rows])
