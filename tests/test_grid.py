"""The grid of published runs: what it declares, what is done of it, what is left to do, and what fits."""

import importlib
import json
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import jupytext
import pytest
import yaml

from expvae_book import chapters, parameters, protocols, provenance, runs
from expvae_book.data.card import DataCard
from expvae_book.pages import comparison

REPOSITORY = provenance.REPOSITORY
sys.path.insert(0, str(REPOSITORY / "workflow"))
grid = importlib.import_module("grid")
sys.path.pop(0)

JOBS = grid.read()


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@cache
def chapter(name):
    path = REPOSITORY / "book" / f"{name}.md"
    return jupytext.read(path, fmt="md:myst")


def keep(chapter, given, *, spent=60.0, device="cpu: 1 threads", old=(), **entries):
    """Store the record of a run that holds no result."""
    versions = protocols.used(chapter, given) | dict.fromkeys(old, 0)
    length = given.get("steps", given.get("epochs", 0))
    record = {
        "chapter": chapter,
        "parameters": given,
        "protocols": versions,
        "metrics": [],
        "losses": {},
        "recipe": {},
        "data": asdict(DataCard("mnist", "partial", {"train": 1}, {"train": 1}, "digest", "licence", "credit")),
        "git": {"commit": None, "dirty": None},
        "budget": {"unit": "epochs", "asked": 1000, "used": length},
        "seconds": spent if isinstance(spent, dict) else {"training": spent},
        "device": device,
    }
    name = ",".join(f"{name}={value}" for name, value in sorted(given.items()))
    path = runs.root() / runs.STORES.get(chapter, chapter) / name / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record | entries))


def declare(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return grid.read(path)


def job(name="a", *, stored=(), after=(), needs=(), minutes=10.0, gpu_minutes=1.0, minimum=False):
    return grid.Job(name, name, "mnist", {}, stored, needs, after, 1, 1000, minutes, gpu_minutes, minimum)


def planned(name="a", minutes=10.0, state="missing", **options):
    return grid.Planned(job(name, **options), state, minutes, ())


# --- what is declared ------------------------------------------------------------------------------------------------


def test_the_grid_is_in_order_of_worth_with_the_minimum_first():
    marks = [job.minimum for job in JOBS]
    assert marks == sorted(marks, reverse=True)
    in_file = list(yaml.safe_load(grid.GRID.read_text()))
    for minimum in (True, False):
        groups = [job.group for job in JOBS if job.minimum == minimum]
        assert groups == sorted(groups, key=in_file.index)
    assert JOBS[0].name == "mnist,seed=0,digit=1"


def test_the_minimum_is_that_of_the_campaign():
    counts = Counter(job.group for job in JOBS if job.minimum)
    assert {name: counts[name] for name in counts if name.startswith(("mnist", "rbm", "ucsd", "mvtec", "sprites"))} == {
        "mnist": 6,  # three seeds of two digits
        "mnist-report2": 2,
        "mnist-wrong": 2,
        "rbm": 8,  # two seeds of two digits, both kinds of units
        "rbm-report2": 4,
        "ucsd": 3,
        "ucsd-report2": 1,
        "ucsd-long": 1,
        "mvtec": 15,
        "mvtec-random": 3,
        "mvtec-report2": 3,
        "sprites-first": 1,
        "sprites": 2,  # with the first, three seeds
        "sprites-beta": 1,
    }


def test_every_job_has_a_name_and_a_run_of_its_own_and_comes_after_those_that_it_waits_for():
    places = {job.name: place for place, job in enumerate(JOBS)}
    assert len(places) == len({job.rule for job in JOBS}) == len(JOBS)
    stored = [json.dumps([runs.STORES.get(job.chapter, job.chapter), one]) for job in JOBS for one in job.stored]
    assert len(set(stored)) == len(stored)
    assert all(job.stored for job in JOBS)
    assert all(places[name] < place for place, job in enumerate(JOBS) for name in job.after)


def test_jobs_wait_for_those_whose_weights_they_read():
    after = {job.name: set(job.after) for job in JOBS}
    assert after["rbm,seed=1,digit=3,units=spin"] == {"mnist,seed=1,digit=3"}
    assert after["ucsd-long,recipe=report1"] == {"ucsd,seed=0"}
    assert after["ucsd-long,recipe=brongers2021"] == {"ucsd-others,recipe=brongers2021"}
    assert after["ablations"] == {"mnist,seed=0,digit=1", "mnist,seed=0,digit=3"}
    assert after["sprites,seeds=3"] == {"sprites-first", "sprites,seeds=2"}


def test_chapters_take_every_command_of_the_grid():
    for job in [*JOBS, *grid.read(scale=0.01)]:
        program, *rest = job.command()
        if program == "papermill":
            path, output, *options = rest
            assert (path, output) == (f"book/{job.chapter}.md", "out.ipynb")
            assert options[::3] == ["-p"] * (len(options) // 3)
            given = dict(zip(options[1::3], options[2::3], strict=True))
            known = parameters.declared(chapter(job.chapter), path)
            checked = parameters.check(given, known, path)
            assert {name: str(value) for name, value in checked.items()} == given
        else:
            benchmark, data = rest[2], rest[4]
            assert [program, *rest] == ["python", "-m", "benchmarks", benchmark, "--data", data]
            assert (REPOSITORY / "benchmarks" / f"{benchmark}.py").is_file()


def test_the_commands_of_the_readme_are_plain_papermill():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("    papermill book/")]
    assert len(commands) > 5
    for _, path, output, *options in commands:
        assert output == "out.ipynb"
        given = dict(zip(options[1::3], options[2::3], strict=True))
        parameters.check(given, parameters.declared(chapter(Path(path).stem), path), path)


class AskedError(Exception):
    """A chapter has asked for its runs."""


@pytest.mark.parametrize("group", dict.fromkeys(job.group for job in JOBS if job.chapter != "performance"))
def test_jobs_store_the_runs_that_their_chapter_asks_for(group, monkeypatch):
    # The grid knows by itself what a chapter calls its runs: to plan it reads no notebook and needs no torch.
    one = [job for job in JOBS if job.group == group][-1]
    given, asked = {**one.parameters, "data": "sample"}, []

    def ask(name, wanted, *rest, **options):
        asked.extend([wanted] if isinstance(wanted, dict) else wanted)
        raise AskedError(name)

    for function in ("run", "jobs"):
        monkeypatch.setattr(chapters, function, ask)
    monkeypatch.setattr(runs, "load", ask)
    namespace = {}
    with pytest.raises(AskedError):
        for cell in chapter(one.chapter).cells:
            if cell.cell_type == "code":
                exec(cell.source, namespace)
                namespace |= given if "parameters" in cell.metadata.get("tags", []) else {}
    names = {runs._folder_name(runs._determining(one)) for one in asked}
    assert names == {runs._folder_name(one) for one in grid.records(one.chapter, given)}


COMPARED = {"mnist": "mnist", "ucsd": "ucsd", "mvtec15": "mvtec", "disentanglement": "disentanglement"}


@pytest.mark.parametrize("name", COMPARED)
def test_the_command_of_a_run_asks_its_chapter_for_this_run(name):
    jobs = [job for job in JOBS if job.chapter == name]
    assert jobs
    for wanted in (one for job in jobs for one in job.stored):
        words = shlex.split(comparison.command(runs.Run(COMPARED[name], dict(wanted), {}, Path())))
        assert words[:3] == ["papermill", f"book/{name}.md", "out.ipynb"]
        assert set(words[3::3]) == {"-p"}
        known = parameters.declared(chapter(name), name)
        given = parameters.check(dict(zip(words[4::3], words[5::3], strict=True)), known, name)
        stored = grid.records(name, {one: of.default for one, of in known.items()} | given)
        assert any(wanted.items() <= one.items() for one in stored), (wanted, words)


def test_a_rehearsal_runs_some_jobs_of_each_kind_at_a_share_of_their_budget():
    rehearsed = grid.read(scale=0.01)
    by_name = {job.name: job for job in rehearsed}
    assert {job.chapter for job in rehearsed} == {job.chapter for job in JOBS} - {"ablations"}
    assert by_name["mnist,seed=0,digit=1"].parameters["epochs"] == 1
    assert by_name["ucsd-long,recipe=report1"].parameters["epochs"] == 3
    assert by_name["sprites-first"].stored[0]["steps"] == 300
    assert all(name in by_name for job in rehearsed for name in job.after)
    assert len(rehearsed) < len(JOBS) / 8


@pytest.mark.parametrize(
    ("group", "lacking"),
    [("chapter: mnist", "parameters"), ("parameters: {}\n  chapter: mnist", "needs"), ("[]", "indices")],
)
def test_a_group_that_is_not_declared_whole_is_named(group, lacking, tmp_path):
    with pytest.raises(ValueError, match=rf"grid\.yaml: the group digits is not declared .*{lacking}"):
        declare(tmp_path, f"digits:\n  {group}\n")


# --- what is done, and how long the rest takes -----------------------------------------------------------------------

DIGITS = """
digits:
  chapter: mnist
  parameters: {recipe: liu2020, digit: 1, seed: [0, 1, 2], epochs: 4, data: real}
  needs: [mnist]
  memory: 1000
  minutes: 10
  gpu_minutes: 2
"""


def test_what_is_stored_of_today_and_whole_is_done(tmp_path, monkeypatch):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").touch()
    jobs = declare(tmp_path, DIGITS)
    (first,) = jobs[0].stored
    monkeypatch.setattr(runs, "_data_digest", lambda name: "digest")

    def now():
        return grid.plan(jobs, tmp_path)[0].state

    assert now() == "missing"
    assert all(one.due for one in grid.plan(jobs, tmp_path))
    keep("mnist", first)
    assert now() == "stored"
    assert [one.due for one in grid.plan(jobs, tmp_path)] == [False, True, True]
    monkeypatch.setattr(runs, "_data_digest", lambda name: "another digest")
    assert now() == "of other data"
    shutil.rmtree(runs.root())
    keep("mnist", first, old=["TRAINING"])
    assert now() == "outdated"
    shutil.rmtree(runs.root())
    keep("mnist", first, budget={"unit": "epochs", "asked": 100, "used": 3})  # told to end early
    assert now() == "incomplete"


@pytest.mark.parametrize(("used", "state"), [(4 * 48, "stored"), (4 * 48 - 1, "incomplete")])
def test_a_budget_in_images_is_whole_with_all_epochs_of_them(used, state):
    given = {"category": "bottle", "epochs": 4, "data": "real"}
    keep("mvtec15", given, budget={"unit": "images", "asked": 9, "used": used}, training={"images": 48})
    assert grid.state("mvtec15", given) == state


def test_jobs_without_data_or_a_gpu_are_told_and_left_out(tmp_path):
    jobs = declare(tmp_path, DIGITS + DIGITS.replace("digits", "others").replace("digit: 1", "digit: 3", 1))
    jobs = [replace(one, needs=(), minutes=None) if one.group == "others" else one for one in jobs]
    plan = grid.plan(jobs, tmp_path)
    assert [(one.due, one.lacks) for one in plan] == [(False, ("mnist",))] * 3 + [(False, ("a GPU",))] * 3
    assert [one.due for one in grid.plan(jobs, tmp_path, gpu=True)] == [False] * 3 + [True] * 3
    told = grid.report(plan, [])
    assert "left out: 3 of digits, which lack mnist\n" in told
    assert "left out: 3 of others, which lack a GPU\n" in told
    keep("mnist", jobs[0].stored[0])
    assert grid.plan(jobs, tmp_path)[0].state == "stored"  # also without its data


def test_a_job_takes_what_others_of_its_group_took_over_what_was_declared(tmp_path):
    jobs = [replace(one, needs=()) for one in declare(tmp_path, DIGITS)]
    jobs = [*jobs[:2], replace(jobs[2], minutes=30.0)]
    assert [one.minutes for one in grid.plan(jobs)] == [10.0, 10.0, 30.0]
    keep("mnist", jobs[0].stored[0], spent=15 * 60.0)
    assert [one.minutes for one in grid.plan(jobs)][1:] == [15.0, 45.0]
    assert [one.minutes for one in grid.plan(jobs, gpu=True)][1:] == [2.0, 2.0]  # nothing is known of a GPU
    keep("mnist", jobs[1].stored[0], spent=60.0, device="cuda: H100")
    assert grid.plan(jobs, gpu=True)[2].minutes == 1.0
    assert grid.plan(jobs)[2].minutes == 45.0


def test_a_training_of_models_side_by_side_counts_once():
    beside = {"training, all side by side": 600.0}
    models = [{"model": place} for place in range(3)]
    for one, seconds in zip(models, [beside, beside, {"training, all side by side": 300.0}], strict=True):
        keep("disentanglement", one, spent={**seconds, "measuring": 20.0})
    several = replace(job(stored=tuple(models)), chapter="disentanglement")
    assert grid.taken(several, gpu=False) == pytest.approx((600 + 300 + 3 * 20) / 60)


def test_the_report_tells_jobs_states_and_hours():
    plan = [
        planned("first", 30, "outdated", minimum=True),
        planned("second", 60),
        planned("third", 60),
        planned("done", state="stored"),
    ]
    lines = grid.report(plan, plan[:2], commands=True).splitlines()
    assert lines[0] == "*     30 min  outdated      first"
    assert lines[1].strip() == "papermill book/mnist.md out.ipynb"
    assert lines[-2] == "4 jobs are declared and 1 done. To do: 2, 1.5 h of a core; the minimum (*): 1, 0.5 h."
    assert lines[-1] == "1 more do not fit: 1.0 h."


def test_a_plan_needs_neither_torch_nor_data(tmp_path):
    code = "import sys; sys.path.insert(0, 'workflow'); import grid; grid.main(); print({'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "papermill book/disentanglement.md out.ipynb" in done.stdout  # which needs no data
    assert "left out: 4 of sanity-mnist, which lack mnist\n" in done.stdout


# --- what fits -------------------------------------------------------------------------------------------------------


def names(chosen):
    return [one.job.name for one in chosen]


def test_jobs_are_packed_side_by_side_into_the_time_the_worthier_first():
    plan = [planned("a", 30), planned("b", 40), planned("c", 30), planned("d", 20), planned("e", 10)]
    assert names(grid.pack(plan, 60, 0, {}, 1)) == ["a", "c"]
    assert names(grid.pack(plan, 60, 0, {}, 2)) == ["a", "b", "c", "d"]
    assert names(grid.pack(plan, 25, 0, {}, 2)) == ["d", "e"]


def test_jobs_are_packed_into_what_can_be_uploaded_counting_each_data_set_once():
    plan = [planned("a", needs=("big",)), planned("b", needs=("small",)), planned("c", needs=("big", "small"))]
    plan += [planned("d", needs=("other",)), planned("e")]
    sizes = {"big": 50.0, "small": 10.0, "other": 5.0}
    assert names(grid.pack(plan, 600, 60, sizes, 1)) == ["a", "b", "c", "e"]
    assert names(grid.pack(plan, 600, 20, sizes, 1)) == ["b", "d", "e"]


def test_jobs_are_packed_after_those_that_they_wait_for():
    plan = [planned("a", 30), planned("b", 20, after=("a",)), planned("c", 5, after=("stored before",))]
    assert names(grid.pack(plan, 50, 0, {}, 4)) == ["a", "b", "c"]
    assert names(grid.pack(plan, 49, 0, {}, 4)) == ["a", "c"]
    assert names(grid.pack(plan, 25, 0, {}, 4)) == ["c"]
    assert names(grid.pack([planned(state="stored"), planned("b", 20, after=("a",))], 20, 0, {}, 1)) == ["b"]


def test_data_are_as_large_as_their_files(tmp_path):
    for name, kib in {
        "mvtec/bottle/train/good/0.png": 512,
        "mvtec/bottle/NOTE.txt": 256,
        "mvtec/cable/0.png": 9,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(kib * 1024))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "resnet18_imagenet.safetensors").write_bytes(bytes(2**20))
    sizes = grid.sizes(["mvtec/bottle", "imagenet", "mnist"], tmp_path)
    assert sizes == {"mvtec/bottle": 0.75, "imagenet": 1.0, "mnist": 0.0}


# --- Snakemake -------------------------------------------------------------------------------------------------------


def snakemake(*options):
    pytest.importorskip("snakemake")
    command = [sys.executable, "-m", "snakemake", "-n", "--nolock", *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_a_dry_run_lists_what_is_to_be_done_and_how_long_it_takes():
    done = snakemake("--config", "grid=workflow/samples.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("4 jobs are declared and 0 done. To do: 4, 0.2 h of a core")
    assert "4 min  missing       longer\n" in done.stdout


def test_a_rehearsal_wants_a_store_of_its_own(monkeypatch):
    monkeypatch.delenv("EXPVAE_RUNS")
    done = snakemake("--config", "scale=0.01")
    assert done.returncode != 0
    assert "A rehearsal needs a store of its own: let EXPVAE_RUNS name a folder." in done.stdout + done.stderr


@pytest.mark.parametrize("profile", ["default", "local", "gpu", "slurm"])
def test_snakemake_knows_every_setting_of_a_profile(profile):
    pytest.importorskip("snakemake")
    from snakemake.cli import get_argument_parser

    known = {flag.lstrip("-") for action in get_argument_parser()._actions for flag in action.option_strings}
    settings = yaml.safe_load((REPOSITORY / "workflow" / "profiles" / profile / "config.yaml").read_text())
    assert settings.keys() <= known
