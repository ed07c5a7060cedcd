"""The benchmarks on small inputs: that the contestants agree, and that a stored timing says what it was made with."""

import importlib
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from expvae_book import devices, factorvae, protocols, provenance, runs
from expvae_book.data import dsprites
from expvae_book.recipes import DSPRITES, MNIST, RBM

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
    monkeypatch.setattr(training, "NETWORKS", {})
    rows = training.measure(digits(70), replace(MNIST["liu2020"], batch_size=32), CPU, 1)
    ours, plain = values(rows, "images/s").values()
    assert values(rows, "ratio") == {"expvae_book.training / plain loop": pytest.approx(ours / plain)}


def test_the_share_of_a_loop_is_its_operations_beside_those_of_a_product(monkeypatch):
    training = load("training")
    monkeypatch.setattr(training, "SIDE", 64)
    seconds = {"training, float32": [2.0], "product, float32": [3.0, 1.0]}
    seconds |= {"training, bfloat16": [1.0], "product, bfloat16": [0.5]}

    def race(ways, rounds, device):
        assert list(ways) == list(seconds)
        for way in ways.values():
            way()
        return seconds

    monkeypatch.setattr(training.timing, "race", race)
    recipe = replace(MNIST["liu2020"], batch_size=2)
    network = training.Network(training.MNISTVAE, (1, 28, 28), recipe)
    rows = training.shares("MNIST", network, CPU, 1)
    # By hand, without biases: both convolutions, their mirror images, and four fully connected layers with two heads.
    convolutions = 2 * (64 * 14 * 14 * 16 + 128 * 7 * 7 * 64 * 16)
    layers = 2 * 6272 * 1024 + 2 * 1024 * 32 + 32 * 1024
    first = 64 * 14 * 14 * 16  # has no gradient with respect to the images
    each = 2 * (3 * (convolutions + layers) - first)
    assert training.operations(network) == each
    shares = values(rows, "share of the rate of a product")
    product = 2 * 64**3
    assert shares == pytest.approx({"float32": 4 * each / product, "bfloat16": 8 * each / (2 * product)})


def test_the_plain_loop_of_factorvae_takes_the_steps_of_ours(monkeypatch):
    benchmark = load("factorvae")
    recipe = replace(DSPRITES["report2"], batch_size=6)
    sprites, index_N = dsprites.load("sample"), torch.arange(0, dsprites.COUNT, 9001)
    group = factorvae.Group([factorvae.Candidate(gamma=benchmark.GAMMA, seed=0)], recipe, CPU)
    drawn = torch.Generator().set_state(group.generators[0].get_state())
    noises, orders, losses = [], [], []
    monkeypatch.setattr(torch, "randn_like", lambda _mu: noises.pop(0))
    monkeypatch.setattr(torch, "randperm", lambda _count: orders.pop(0))
    step = benchmark.plain_step

    def replayed(vae, critic, optimizers, _x, _other, precision):
        """The plain step, with the images, the noise and the permutations of ours."""
        pairs = index_N[torch.randint(len(index_N), (12,), generator=drawn)]
        noises.extend(torch.randn(2, 6, 10, generator=drawn))
        orders.extend(torch.rand(6, 10, generator=drawn).argsort(0).T)
        torch.randint(10, (2,), generator=drawn)
        losses.append(step(vae, critic, optimizers, *sprites.images(pairs).float().chunk(2), precision))
        weights.update({"encoder": vae.encoder, "decoder": vae.decoder, "discriminator": critic})

    monkeypatch.setattr(benchmark, "plain_step", replayed)
    monkeypatch.setattr(benchmark, "_endless", lambda _loader: iter([torch.empty(2, 0)] * 3))
    weights = {}
    benchmark.plain_loop(sprites.images(index_N).squeeze(1).numpy(), recipe, CPU, "float32", steps=3)()
    for vae_loss, critic_loss in losses:
        parts = factorvae.step(group, sprites.images, index_N, 6, "float32")
        total = parts["reconstruction"] + parts["kl"] + benchmark.GAMMA * parts["total_correlation"]
        assert (vae_loss, critic_loss) == pytest.approx((total.item(), parts["discriminator"].item()), rel=1e-5)
    for name, network in group.named_children():
        for key, value in network.alone(0).items():
            torch.testing.assert_close(weights[name].state_dict()[key], value, rtol=0, atol=3e-6)


def test_pairs_are_an_image_and_one_at_random(monkeypatch):
    benchmark = load("factorvae")
    x_NYX = digits(3).numpy()
    monkeypatch.setattr(benchmark.random, "randrange", lambda count: count - 1)
    first, second = benchmark.Pairs(x_NYX)[1]
    assert torch.equal(first, torch.tensor(x_NYX[1:2], dtype=torch.float32))
    assert torch.equal(second, torch.tensor(x_NYX[2:], dtype=torch.float32))


def test_the_steps_of_models_side_by_side_are_added_up_and_set_beside_peers_in_the_same_precision(monkeypatch):
    benchmark = load("factorvae")
    monkeypatch.setattr(benchmark, "STEPS", {1: 2, 3: 1})
    monkeypatch.setattr(benchmark, "IMAGES", 8)
    monkeypatch.setattr(benchmark, "SIDE", 64)
    calls = []
    plain_step, step = benchmark.plain_step, factorvae.step
    monkeypatch.setattr(
        benchmark, "plain_step", lambda *given: calls.append(("plain", given[-1])) or plain_step(*given)
    )
    monkeypatch.setattr(
        factorvae,
        "step",
        lambda group, *given: calls.append((len(group.candidates), given[-1])) or step(group, *given),
    )

    def race(contestants, rounds, _device):
        done = {}
        for name, turn in contestants.items():
            before = len(calls)
            turn()
            done[name] = calls[before:]
        assert list(done.values()) == [
            [("plain", "float32")] * 2,
            [("plain", "bfloat16")] * 2,
            [(1, "float32")] * 2,
            [(3, "float32")],
            [(1, "bfloat16")] * 2,
            [(3, "bfloat16")],
            [(1, "float32")] * 2,
            [],
            [],
        ]
        return {name: [0.25 if name == in_bfloat16 else 0.5] * rounds for name in contestants}

    monkeypatch.setattr(benchmark.timing, "race", race)
    in_bfloat16 = f"{benchmark.PLAIN}, bfloat16"
    recipe = replace(benchmark.RECIPE, batch_size=4)
    rows = benchmark.measure(dsprites.load("sample"), recipe, CPU, 1)
    names = ["1 model", "3 models side by side", "1 model, bfloat16", "3 models side by side, bfloat16"]
    rates = dict(zip(names, [4, 6, 4, 6], strict=True))
    assert values(rows, "steps/s") == {benchmark.PLAIN: 4, in_bfloat16: 8} | rates | {benchmark.ADDED: 4}
    ratios = [1, 1.5, 0.5, 0.75]
    peers = [benchmark.PLAIN] * 2 + [in_bfloat16] * 2
    assert values(rows, "ratio") == {
        f"{name} / {peer}": ratio for name, peer, ratio in zip(names, peers, ratios, strict=True)
    } | {f"{benchmark.ADDED} / 1 model": 1}
    # By hand, without biases and for one image: five convolutions, the posterior, their mirror images (the images have
    # no gradient), the encoder once more, and six fully connected layers for two draws.
    encoder = 32 * 16 * 32**2 + 32 * 32 * 16 * 16**2 + 32 * 64 * 16 * 8**2 + 64 * 64 * 16 * 4**2 + 64 * 128 * 16
    decoder, first = encoder + 128 * 10, 32 * 16 * 32**2
    encoder += 128 * 20
    layers = 10 * 1000 + 4 * 1000**2 + 1000 * 2
    each = 2 * 4 * (3 * (encoder + decoder) - first + encoder + 2 * 3 * layers)
    assert benchmark.operations(recipe) == each
    product = 2 * 64**3 / 0.5
    assert values(rows, "share of the rate of a product") == pytest.approx(
        {name: rate * each / product for name, rate in rates.items()}
    )


def test_the_change_of_precision_is_set_beside_the_spread_between_seeds(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path))
    benchmark, asked = load("precision"), []
    trained = benchmark.weights.trained
    monkeypatch.setattr(
        benchmark.weights,
        "trained",
        lambda *given, **options: asked.append((options["seed"], options["precision"])) or trained(*given, **options),
    )
    task, card = benchmark.load("sample")
    few = replace(
        task, train_NCYX=task.train_NCYX[:8], outlier_NCYX=task.outlier_NCYX[:6], truth_NYX=task.truth_NYX[:6]
    )
    rows = benchmark.measure(few, replace(MNIST["liu2020"], epochs=1, batch_size=4), CPU, 2)
    assert card.generated
    assert asked == [(seed, precision) for precision in ("float32", "bfloat16") for seed in (0, 1)]
    for name in ("negative ELBO", "pixel AUROC, liu2020_paper", "pixel AUROC, liu2020_code"):
        of = {(row["method"], row["subset"]): row["value"] for row in rows if row["metric"] == name}
        plain, other = ([of[how, f"seed {seed}"] for seed in (0, 1)] for how in ("float32", "bfloat16"))
        assert plain != other
        assert of[benchmark.CHANGE, ""] == pytest.approx(np.mean(other) - np.mean(plain))
        assert of[benchmark.SPREAD, ""] == pytest.approx(np.std(plain, ddof=1))
    # Seeds of a stored run are taken from it, and it is said what made them.
    run = SimpleNamespace(outdated=[], of_data_at_hand=True, record={"metrics": rows, "git": "g", "device": "d"})
    monkeypatch.setattr(benchmark.runs, "load", lambda *given: run)
    known, made = benchmark.stored("sample")
    assert made == [{"seeds": ["seed 0", "seed 1"], "git": "g", "device": "d"}]
    asked.clear()
    again = benchmark.measure(replace(few, known=known), replace(MNIST["liu2020"], epochs=1, batch_size=4), CPU, 3)
    assert asked == [(2, "float32"), (2, "bfloat16")]
    assert [row for row in again if row["subset"] in ("seed 0", "seed 1")] == [row for row in rows if row["subset"]]
    run.record |= {"metrics": again, "carried": made, "git": "h"}
    assert benchmark.stored("sample")[1] == [*made, {"seeds": ["seed 2"], "git": "h", "device": "d"}]


# --- what is stored --------------------------------------------------------------------------------------------------


def test_the_command_stores_a_timing():
    command = [sys.executable, "-c", ONE, "rbm", "--data", "sample"]
    subprocess.run(command, cwd=provenance.REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    run = runs.load("performance", {"benchmark": "rbm", "data": "sample"})
    assert run.record["protocols"] == protocols.versions("benchmark rbm")
    assert run.outdated == []


@pytest.mark.parametrize(
    ("name", "data", "recipe"),
    [
        ("training", "mnist", MNIST["liu2020"]),
        ("factorvae", "dsprites", DSPRITES["report2"]),
        ("rbm", "mnist", RBM["ours"]),
    ],
)
def test_a_timing_names_the_data_and_the_recipe_that_it_was_fed_with(monkeypatch, name, data, recipe):
    given = []
    monkeypatch.setattr(load(name), "measure", lambda *fed: given.extend(fed) or [])
    main(monkeypatch, name, "--data", "sample", "--device", "cpu")
    run = runs.load("performance", {"benchmark": name, "data": "sample"})
    assert (run.card.name, run.record["recipe"]["source"]) == (data, recipe.source)
    assert len(given[0]) == run.card.counts.get("all", run.card.counts.get("train"))
    assert given[1] == recipe


def test_a_timing_names_its_own_peers_and_device(monkeypatch, capsys):
    monkeypatch.setattr(devices, "choose_device", lambda name: torch.device(name))
    monkeypatch.setattr(devices, "describe_device", str)
    expected = {
        "training": ("meta", {"torchvision", "pillow"}),
        "attention": ("meta", {"captum"}),
        "pixel": ("cpu", {"numpy", "scikit-learn", "torchmetrics"}),
        "factorvae": ("meta", set()),
        "rbm": ("meta", {"scikit-learn"}),
        "precision": ("meta", set()),
        "gpu": ("meta", set()),
        "endurance": ("cpu", set()),
    }
    for name, (device, peers) in expected.items():
        monkeypatch.setattr(load(name), "measure", lambda *_: [runs.row("ratio", 2.5, "theirs / ours")])
        main(monkeypatch, name, "--rounds", "2", "--data", "sample", "--device", "meta")
        record = runs.load("performance", {"benchmark": name, "data": "sample"}).record
        assert (record["device"], set(record["peers"])) == (device, peers)
        assert record["budget"]["used"] == 2
        assert "theirs / ours" in capsys.readouterr().out


# --- a GPU beside the CPU --------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The check of a GPU with one network of each kind."""
    gpu = load("gpu")
    monkeypatch.setattr(gpu, "STEPS", 2)
    monkeypatch.setattr(gpu, "NETWORKS", {"MNIST": gpu.NETWORKS["MNIST"]})
    monkeypatch.setattr(gpu, "FACTORVAES", {"AD-FactorVAE": gpu.FACTORVAES["AD-FactorVAE, brongers2021"]})
    monkeypatch.setattr(gpu, "MACHINES", {"RBM": gpu.MACHINES["RBM"]})
    monkeypatch.setattr(gpu.disentanglement, "PERFECT_DRAWS", 1)
    monkeypatch.setattr(gpu.disentanglement, "SPARE", (0,))
    return gpu


@pytest.mark.usefixtures("one_thread")
def test_a_device_is_no_different_from_itself_in_all_that_is_compared(small):
    rows = [
        row for name, compute in small.comparisons(dsprites.sample()) for row in small.differences(name, compute, CPU)
    ]
    assert {row["value"] for row in rows} == {0.0}
    compared = {(row["subset"], row["method"]) for row in rows}
    assert {("MNIST conv1", f"route {route}") for route in ("loop", "batched", "pooled")} <= compared
    assert {("MNIST conv2", preset) for preset in small.PRESETS} <= compared
    assert {("AD-FactorVAE", name) for name in ("attention", "discriminator", "gradient")} <= compared
    assert {("MNIST", "losses of 2 steps"), ("RBM", "weights after 2 steps")} <= compared
    assert {("measures", name) for name in ("auroc", "aupro", "MIG", "DCI completeness")} <= compared


def test_what_a_device_computes_otherwise_is_told_over_the_greatest_value():
    told = iter([{"maps": torch.tensor([1.0, -4.0])}, {"maps": torch.tensor([1.5, -4.0])}])
    (row,) = load("gpu").differences("MNIST", lambda device: next(told), CPU)
    assert (row["value"], row["method"], row["subset"]) == (0.125, "maps", "MNIST")


def test_every_training_is_timed_in_both_precisions_and_on_the_cpu(small):
    trainings = dict(small.trainings(dsprites.sample()))
    assert list(trainings) == ["MNIST", "AD-FactorVAE", "RBM"]
    for train in trainings.values():
        train(CPU, "float32")
    asked = []
    rows = small.speeds("MNIST", lambda *where: asked.append(where), CPU, 3)
    # Each after a turn that is not counted.
    assert asked == [(CPU, "float32"), (CPU, "bfloat16")] * 4 + [(CPU, "float32")] * 2
    assert [(row["method"], row["n"]) for row in rows] == [
        ("cpu, float32", 3),
        ("cpu, bfloat16", 3),
        ("cpu, float32, 1 turn", 1),
    ]


def test_without_a_gpu_one_sentence_is_said_and_nothing_stored(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "gpu", "--data", "sample", "--device", "cpu")
    assert stopped.value.code is None
    said = "There is no GPU here to hold against the CPU: nothing was run, and nothing is stored.\n"
    assert capsys.readouterr().out == said
    assert runs.find("performance") == []


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
    names = ("training", "attention", "pixel", "factorvae", "rbm")
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
        (["memory"], "'memory' is no benchmark; choose from: training, attention, pixel, factorvae, rbm, precision"),
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
