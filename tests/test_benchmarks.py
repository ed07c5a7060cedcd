"""The benchmarks on small inputs: that the contestants agree, and that a stored timing says what it was made with."""

import importlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lib import provenance, runs
from lib.recipes import MNIST

CPU = torch.device("cpu")
# What `python -m benchmarks NAME` runs, with a measurement that takes no time.
ONE = """
import importlib, runpy, sys
name = sys.argv[1]
importlib.import_module(f"benchmarks.{name}").measure = lambda *_: []
runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(provenance.REPOSITORY)
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path))


def load(name):
    return importlib.import_module(f"benchmarks.{name}")


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    load("__main__").main()


def digits(count):
    return torch.randint(0, 256, (count, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def values(rows, metric):
    return {row["method"]: row["value"] for row in rows if row["metric"] == metric}


# --- what is measured ------------------------------------------------------------------------------------------------


def test_attention_is_that_of_its_peers_with_the_latents_of_the_recipe(monkeypatch):
    attention = load("attention")
    build = attention.MNISTVAE
    latents = []

    def spy(latent_dim):
        latents.append(latent_dim)
        return build(latent_dim)

    monkeypatch.setattr(attention, "NETWORKS", {"MNIST": attention.Network(spy, (3, 1, 28, 28), ("conv2",))})
    rows = attention.measure(digits(5), replace(MNIST["liu2020"], latent_dim=5), CPU, 1)
    assert latents == [5]
    last = [row for row in rows if row["subset"] == "MNIST conv2"]
    routes = {"route loop", "route batched", "route pooled"}
    assert values(last, "seconds").keys() == {attention.OURS, attention.LOOP, attention.CAPTUM, *routes}
    first = [row for row in rows if row["subset"] == "MNIST conv1"]
    assert values(first, "seconds").keys() == {attention.OURS, attention.LOOP}
    assert max(values(rows, "greatest difference / greatest value").values()) < 1e-5
    assert values(rows, "images per batch") == {"": 3}


@pytest.mark.parametrize(("latents", "routes"), [(1, ["loop", "batched"]), (32, ["loop", "batched", "pooled"])])
def test_attention_times_the_pooled_route_where_the_rule_takes_it(latents, routes):
    attention = load("attention")
    model = attention.MNISTVAE(latents).eval()
    ways = attention._ways(model, "encoder.conv2", torch.rand(1, 1, 28, 28), closely=True)
    assert list(ways)[3:] == [f"route {route}" for route in routes]


def test_pixel_counts_give_the_auroc_of_the_peers(monkeypatch):
    pixel = load("pixel")
    monkeypatch.setattr(pixel, "MILLION", 10_000)
    rows = pixel.measure(digits(1), MNIST["liu2020"], torch.device("meta"), 1)
    assert {row["subset"] for row in rows} == {"1e5 pixels", "1e6 pixels"}
    assert [row["value"] for row in rows if row["metric"] == "AUROC difference"] == pytest.approx([0, 0], abs=1e-12)
    small = [row for row in rows if row["subset"] == "1e5 pixels"]
    seconds = values(small, "seconds")
    assert len(seconds) == 4
    assert values(small, "ratio") == {
        f"{name} / {pixel.OURS}": pytest.approx(value / seconds[pixel.OURS])
        for name, value in seconds.items()
        if name != pixel.OURS
    }


def test_training_is_as_many_times_as_fast_as_the_plain_loop(monkeypatch):
    training = load("training")
    monkeypatch.setattr(training, "IMAGES", 64)
    rows = training.measure(digits(70), replace(MNIST["liu2020"], batch_size=32), CPU, 1)
    ours, plain = values(rows, "images/s").values()
    assert values(rows, "ratio") == {"lib.training / plain loop": pytest.approx(ours / plain)}


# --- what is stored --------------------------------------------------------------------------------------------------


def test_a_timing_depends_on_the_code_of_its_own_benchmark_alone():
    command = [sys.executable, "-c", ONE, "training", "--data", "sample"]
    subprocess.run(command, cwd=provenance.REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    run = runs.load("performance", {"benchmark": "training", "data": "sample"})
    modules = {"benchmarks.timing", "benchmarks.training", "lib.data.mnist", "lib.models.mnist", "lib.training"}
    assert run.record["code"] == provenance.code_hashes(modules)
    assert run.stale == []


def test_a_timing_names_its_own_peers_and_device(monkeypatch, capsys):
    monkeypatch.setattr(provenance, "choose_device", lambda name: torch.device(name))
    monkeypatch.setattr(provenance, "describe_device", str)
    expected = {
        "training": ("meta", {"torchvision", "pillow"}),
        "attention": ("meta", {"captum"}),
        "pixel": ("cpu", {"numpy", "scikit-learn", "torchmetrics"}),
    }
    for name, (device, peers) in expected.items():
        monkeypatch.setattr(load(name), "measure", lambda *_: [runs.row("ratio", 2.5, "theirs / ours")])
        main(monkeypatch, name, "--rounds", "2", "--data", "sample", "--device", "meta")
        record = runs.load("performance", {"benchmark": name, "data": "sample"}).record
        assert (record["device"], set(record["peers"])) == (device, peers)
        assert record["budget"]["used"] == 2
        assert "theirs / ours" in capsys.readouterr().out


# --- the command -----------------------------------------------------------------------------------------------------


class Processes:
    """Stands in for subprocess.run; the process of one benchmark fails."""

    def __init__(self, failing=None):
        self.commands = []
        self.failing = failing

    def __call__(self, command):
        self.commands.append(command)
        return subprocess.CompletedProcess(command, returncode=3 if self.failing in command else 0)


def test_several_benchmarks_run_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(subprocess, "run", processes := Processes())
    main(monkeypatch, "--rounds", "2", "--data", "sample", "--device", "cpu")
    options = ["--rounds", "2", "--data", "sample", "--device", "cpu"]
    names = ("training", "attention", "pixel")
    assert processes.commands == [[sys.executable, "-m", "benchmarks", name, *options] for name in names]


def test_a_benchmark_that_fails_stops_those_after_it(monkeypatch):
    monkeypatch.setattr(subprocess, "run", processes := Processes(failing="pixel"))
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "training", "pixel", "attention")
    assert stopped.value.code == 3
    assert [command[3] for command in processes.commands] == ["training", "pixel"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory"], "'memory' is no benchmark; choose from: training, attention, pixel"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--device", "tpu"], "device='tpu' is not there; this machine has: auto, .*cpu"),
    ],
)
def test_the_command_names_what_it_cannot_do(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(subprocess, "run", processes := Processes())
    with pytest.raises(SystemExit):
        main(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert processes.commands == []
