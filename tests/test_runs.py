import dataclasses
import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from expvae_book import files as whole
from expvae_book import protocols, provenance, runs
from expvae_book.data import mvtec
from expvae_book.data.card import DataCard
from expvae_book.recipes import MNIST

HERE = Path(__file__)
PARAMETERS = {"digit": 1, "seed": 0}


def card(kind="complete"):
    counts = {"train": 60_000, "test": 10_000}
    return DataCard("mnist", kind, counts, counts, "ab" * 32, "CC BY-SA 3.0", "MNIST, LeCun et al.", "")


def panel():
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    return figure


def save(parameters=PARAMETERS, chapter="reuse", value=0.5, **changes):
    arguments = {
        "metrics": [runs.row("AUROC", value, "ours", "digit 7", low=0.25, high=0.75, n=9), runs.row("units", None)],
        "losses": {"kl": [2.0, value]},
        "arrays": {"curve": np.full(500, value, np.float32), "count": np.arange(3, dtype=np.uint8)},
        "figures": {"panel": panel()},
        "card": card(),
        "recipe": MNIST["report2"],
        "budget": {"unit": "epochs", "asked": 200, "used": 2},
        "seconds": {"training": 1.5},
        "device": "cpu: 2 threads, AVX2",
    }
    return runs.save(chapter, parameters, **(arguments | changes))


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path / "store"))
    return tmp_path / "store"


def read_record(folder):
    """The record as JSON has it, with the names of the columns that a line for each row leaves out."""
    content = json.loads((folder / "record.json").read_text())
    return content | {"metrics": [dict(zip(runs.METRIC_COLUMNS, values, strict=True)) for values in content["metrics"]]}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- round trip ------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_found_again(store):
    save()
    run = runs.load("reuse", {"seed": 0, "digit": 1})
    assert run.chapter == "reuse"
    assert run.parameters == PARAMETERS
    assert run.folder == store / "reuse" / "digit=1,seed=0"
    assert run.arrays.keys() == {"curve", "count"}
    assert run.arrays["curve"].dtype == np.float32
    assert run.arrays["curve"].tolist() == [0.5] * 500
    assert run.arrays["count"].tolist() == [0, 1, 2]
    assert run.card == card()
    assert run.figure("panel").read_bytes().startswith(b"\x89PNG")
    assert files(store) == [
        "reuse/.lock",
        "reuse/digit=1,seed=0/arrays.npz",
        "reuse/digit=1,seed=0/figures/panel.png",
        "reuse/digit=1,seed=0/record.json",
    ]


def test_files_and_folders_follow_the_umask(store, umask, odd_modes):
    runs.amend(save(), {"note": 1})
    assert odd_modes(store) == {}


def test_the_record_says_where_the_run_comes_from():
    record = save(extra={"weights": {"key": "abc"}}).record
    assert record["recipe"]["epochs"] == 200
    assert record["recipe"]["source"] == MNIST["report2"].source
    assert record["budget"] == {"unit": "epochs", "asked": 200, "used": 2}
    assert record["losses"] == {"kl": [2.0, 0.5]}
    assert record["seconds"] == {"training": 1.5}
    assert record["device"] == "cpu: 2 threads, AVX2"
    assert record["versions"] == provenance.versions()
    assert record["git"] == provenance.commit()
    assert record["data"] == dataclasses.asdict(card())
    assert record["weights"] == {"key": "abc"}
    assert record["protocols"] == protocols.versions("TRAINING", "ATTENTION", "reuse")
    assert save(PARAMETERS, "ucsd").record["protocols"] == protocols.versions("TRAINING", "ATTENTION", "PIXEL", "ucsd")
    assert save({"benchmark": "rbm"}, "performance").record["protocols"] == protocols.versions("benchmark rbm")
    assert abs(time.time() - pd.Timestamp(record["created"]).timestamp()) < 300


def test_the_text_of_a_record_has_a_line_for_each_row():
    rows = [runs.row("AUROC", 0.5, "ours − theirs", 'of "all"\n', low=0.25, high=0.75, n=9), runs.row("units", None)]
    run = save(metrics=rows, extra={"note": '"metrics": []'})
    lines = (run.folder / "record.json").read_text().splitlines()
    at = lines.index(' "metrics": [')
    assert lines[at + 1 : at + 4] == [
        r"""["AUROC","ours − theirs","of \"all\"\n",0.5,0.25,0.75,9],""",
        """["units","","",null,null,null,null]""",
        " ],",
    ]
    assert run.record["metrics"] == rows
    assert read_record(run.folder) == run.record == runs.load("reuse", PARAMETERS).record
    runs.amend(run, {"note": 1})
    assert (run.folder / "record.json").read_text().splitlines()[at : at + 4] == lines[at : at + 4]
    assert runs.load("reuse", PARAMETERS).record == run.record | {"note": 1}
    runs.amend(save(metrics=[]), {"note": 2})
    assert read_record(run.folder)["metrics"] == runs.load("reuse", PARAMETERS).record["metrics"] == []


def test_numbers_of_rows_have_seven_digits_and_ends_of_intervals_five():
    values = {"value": 0.123456789012, "low": 1.5e-13 / 7, "high": 12345678901.5, "n": 1_234_567_890_123}
    (kept,) = save(metrics=[runs.row("AUROC", **values)]).record["metrics"]
    assert [kept[name] for name in values] == [0.1234568, 2.1429e-14, 12346000000.0, 1_234_567_890_123]
    assert (save(value=np.float32(0.1).item()).record["metrics"][0]["value"]) == 0.1


MAPS = ["conv1, liu2020_paper", "conv2, liu2020_paper", "conv2, liu2020_code"]


def job(chapter="ucsd", parameters=PARAMETERS, **changes):
    """A run with three maps, the mean of one, and a baseline; each row's value is its place."""
    names = [
        ("AUROC", MAPS[0], ""),
        ("AUROC", MAPS[1], "test clips"),
        ("AUROC", MAPS[2], ""),
        ("AUROC", f"mean of {MAPS[1]}", ""),
        ("AUROC", f"mean of {MAPS[2]}", ""),
        ("AUROC", "random", ""),
        ("difference", f"{MAPS[1]} − random", "test clips"),
        ("difference", f"{MAPS[1]} − mean of {MAPS[1]}", ""),
        ("difference", f"{MAPS[0]} − random", ""),
        ("difference", f"{MAPS[1]} − {MAPS[2]}", ""),
        ("difference", "liu2020_paper, conv1 − conv2", ""),
        ("correlation", "edges", MAPS[1]),
        ("correlation", f"mean of {MAPS[1]}", MAPS[1]),
        ("correlation", "edges", MAPS[2]),
        ("units", "", ""),
    ]
    rows = [runs.row(metric, float(place), method, subset) for place, (metric, method, subset) in enumerate(names)]
    drawn = {f"resamples/{name}": np.full((2, 5), i, np.float16) for i, name in enumerate(MAPS[:2])}
    return save(parameters, chapter, metrics=rows, arrays=drawn, extra={"maps": MAPS}, **changes)


def test_a_job_is_shown_as_one_of_its_maps():
    run = job()
    assert run.maps == MAPS
    shown = run.at("conv2", "liu2020_paper")
    assert [(row["value"], row["metric"], row["method"], row["subset"]) for row in shown.record["metrics"]] == [
        (1.0, "AUROC", "attention", "test clips"),
        (3.0, "AUROC", "mean attention map", ""),
        (5.0, "AUROC", "random", ""),
        (6.0, "difference", "attention − random", "test clips"),
        (7.0, "difference", "attention − mean attention map", ""),
        (10.0, "difference", "liu2020_paper, conv1 − conv2", ""),
        (11.0, "correlation", "edges", ""),
        (12.0, "correlation", "mean attention map", ""),
        (14.0, "units", "", ""),
    ]
    assert shown.parameters == PARAMETERS | {"layer": "conv2", "preset": "liu2020_paper"}
    assert run.parameters == PARAMETERS
    assert shown.metric("AUROC", "attention", "test clips")["value"] == 1
    assert shown.rows("correlation")["method"].tolist() == ["edges", "mean attention map"]
    assert len(run.record["metrics"]) == 15
    assert shown.maps == []  # else another of its maps could be asked for, whose rows are not there
    assert shown.arrays.keys() == run.arrays.keys()
    other = run.at("conv1", "liu2020_paper")
    assert other.metric("difference", "attention − random")["value"] == 8


def test_a_map_that_a_job_lacks_is_named_with_those_it_has():
    with pytest.raises(
        KeyError, match=r"the run ucsd: .* has no map 'conv3, liu2020_code'; it has: conv1, liu2020_pap"
    ):
        job().at("conv3", "liu2020_code")
    assert save().maps == []
    with pytest.raises(KeyError, match=r"has no map 'conv3, liu2020_code'; it has: none"):
        save().at("conv3", "liu2020_code")


def test_what_resamples_gave_is_read_by_map():
    run = job()
    for place, name in enumerate(MAPS[:2]):
        found = run.resamples(name)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, np.full((2, 5), place))
    with pytest.raises(KeyError, match="resamples/conv2, liu2020_code"):
        run.resamples(MAPS[2])


def test_both_chapters_on_mvtec_find_a_job_of_either(store):
    parameters = {"category": "pill", "seed": 0}
    for chapter, other in (("mvtec10", "mvtec15"), ("mvtec15", "mvtec10")):
        run = job(chapter, parameters)
        assert run.chapter == "mvtec"
        assert run.folder == store / "mvtec" / "category=pill,seed=0"
        for name in (chapter, other, "mvtec"):
            assert runs.load(name, parameters).record == run.record
            assert [found.folder for found in runs.find(name, category="pill")] == [run.folder]
        assert run.record["protocols"] == protocols.used(other, parameters)
    assert len(runs.find()) == 1
    assert runs.find("ucsd") == []


def test_metrics_are_a_table_of_rows():
    metrics = save().metrics
    assert list(metrics.columns) == ["metric", "method", "subset", "value", "low", "high", "n"]
    assert metrics.iloc[0].to_dict() == {
        "metric": "AUROC",
        "method": "ours",
        "subset": "digit 7",
        "value": 0.5,
        "low": 0.25,
        "high": 0.75,
        "n": 9,
    }
    assert metrics.iloc[1][["value", "low", "high", "n"]].isna().all()
    assert list(save(metrics=[]).metrics.columns) == runs.METRIC_COLUMNS


def test_one_number_by_name():
    run = save()
    assert run.metric("AUROC", "ours", "digit 7")["high"] == 0.75
    assert run.metric("units")["value"] is None
    with pytest.raises(KeyError, match="has no metric 'AUROC' of 'theirs' on 'digit 7'"):
        run.metric("AUROC", "theirs", "digit 7")


def test_all_rows_of_a_metric():
    run = save()
    assert run.rows("AUROC")["value"].tolist() == [0.5]
    assert len(run.rows("units")) == 1
    with pytest.raises(KeyError, match=r"the run reuse: .* has no metric 'IoU'"):
        run.rows("IoU")


def test_a_number_as_text():
    rows = [
        runs.row("AUROC", 0.8121, "ours", "all", low=0.78, high=0.84, n=9),
        runs.row("share", 0.25, low=0.125, high=0.5),
        runs.row("parameters", 1_234_567),
        runs.row("units", None),
    ]
    run = save(metrics=rows)
    assert run.text("AUROC", "ours", "all") == "0.812 [0.780, 0.840]"
    assert run.text("share", form=".1%", lacking="") == "25.0% [12.5%, 50.0%]"
    assert run.text("parameters", form=",.0f") == "1,234,567"
    for absent in ("IoU", "units"):
        assert run.text(absent, lacking="") == ""
        assert run.text(absent, lacking="not measured") == "not measured"
        with pytest.raises(KeyError, match=rf"the run reuse: .* has no (metric|value for) '{absent}'"):
            run.text(absent)


def between(low, high):
    return runs.row("AUROC", (low + high) / 2, low=low, high=high)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (0.3, "above"),
        (0.4, "not told apart from"),
        (0.5, "not told apart from"),
        (0.6, "not told apart from"),
        (0.7, "below"),
        (between(0.1, 0.3), "above"),
        (between(0.1, 0.4), "not told apart from"),
        (between(0.45, 0.55), "not told apart from"),
        (between(0.6, 0.9), "not told apart from"),
        (between(0.7, 0.9), "below"),
    ],
)
def test_the_order_of_two_intervals(other, expected):
    assert runs.order(between(0.4, 0.6), other) == expected


def test_without_an_interval_there_is_no_order():
    for pair in ((runs.row("units", 3), 0.5), (between(0.4, 0.6), runs.row("units", 3))):
        with pytest.raises(ValueError, match="order compares intervals, and one of these rows has none"):
            runs.order(*pair)


@pytest.mark.parametrize(
    ("kind", "counts", "data"),
    [
        ("complete", {"train": 60_000, "test": 10_000}, "60,000 train, 10,000 test"),
        ("partial", {"train": 60_000, "test": 10_000}, "60,000 train, 10,000 test, partial data"),
        ("sample", {"clips": 3, "masks": 2_000}, "3 clips, 2,000 masks, sample data"),
    ],
)
def test_the_caption_lists_the_counts(kind, counts, data):
    run = save(card=dataclasses.replace(card(kind), counts=counts))
    assert run.caption == f"Run {run.label}; data: mnist ({data}); 2 of 200 epochs; cpu: 2 threads, AVX2; unverified."


def test_a_missing_figure_names_those_that_are_there():
    with pytest.raises(FileNotFoundError, match=r"has no figure 'maps'; it has: panel$"):
        save().figure("maps")
    with pytest.raises(FileNotFoundError, match=r"it has: none$"):
        save(figures={}).figure("maps")


@pytest.mark.parametrize(
    ("commit", "dirty", "end"),
    [
        ("0123456789abcdef", False, "(01234567)"),
        ("0123456789abcdef", True, "(01234567 with changes)"),
        (None, None, "(no commit)"),
    ],
)
def test_label(monkeypatch, commit, dirty, end):
    monkeypatch.setattr(provenance, "commit", lambda: {"commit": commit, "dirty": dirty})
    assert save().label == f"reuse: digit=1, seed=0 {end}"


def test_a_second_run_takes_the_place_of_the_first(store):
    save(value=0.5, figures={"old": panel()})
    run = save(value=0.75)
    assert run.metric("AUROC", "ours", "digit 7")["value"] == 0.75
    assert files(run.folder) == ["arrays.npz", "figures/panel.png", "record.json"]
    assert len(runs.find()) == 1


def test_find_selects_by_chapter_and_parameters(store):
    for seed in (2, 0, 1):
        save({"digit": 3, "seed": seed})
    save({"digit": 1, "seed": 0})
    save({"layer": "conv1"}, chapter="method")
    assert [run.folder.name for run in runs.find("reuse")] == [
        "digit=1,seed=0",
        "digit=3,seed=0",
        "digit=3,seed=1",
        "digit=3,seed=2",
    ]
    assert len(runs.find()) == 5
    assert [run.parameters["seed"] for run in runs.find("reuse", digit=3)] == [0, 1, 2]
    assert [run.chapter for run in runs.find(layer="conv1")] == ["method"]
    assert runs.find("reuse", digit=9) == runs.find("nothing") == []


def test_half_written_runs_are_not_found(store):
    hidden = store / "reuse" / ".writing-abc"
    save().folder.rename(hidden)
    assert (hidden / "record.json").exists()
    assert runs.find() == []


def test_looking_for_a_run_creates_nothing(store):
    assert runs.load("reuse", PARAMETERS) is None
    assert runs.find() == []
    assert not store.exists()


@pytest.mark.parametrize(("name", "given"), [("device", "cuda"), ("precision", "bfloat16")])
def test_device_and_precision_tell_runs_apart_where_they_are_given(name, given):
    left = save(PARAMETERS | {name: "auto"}, resolved={name: given})
    assert left.parameters == PARAMETERS
    assert left.record["resolved"][name] == given
    assert (
        runs.load("reuse", PARAMETERS).folder == runs.load("reuse", PARAMETERS | {name: "auto"}).folder == left.folder
    )
    assert runs.load("reuse", PARAMETERS | {name: given}) is None
    asked = save(PARAMETERS | {name: given})
    assert asked.parameters == PARAMETERS | {name: given}
    assert runs.load("reuse", PARAMETERS | {name: given}).folder == asked.folder != left.folder


def test_what_auto_became_is_stored():
    run = save(PARAMETERS | {"data": "auto", "initial": "auto"}, resolved={"initial": "random", "precision": "float32"})
    assert run.parameters == PARAMETERS | {"data": "real", "initial": "random"}
    expected = {"data": "real", "device": "cpu", "initial": "random", "precision": "float32"}
    assert run.record["resolved"] == expected
    with pytest.raises(ValueError, match="initial='auto' cannot be stored: say in `resolved` what it has become"):
        save(PARAMETERS | {"initial": "auto"})
    auto = PARAMETERS | {"data": "auto", "initial": "auto"}
    assert runs.load("reuse", auto).folder == run.folder
    imagenet = save(auto, resolved={"initial": "imagenet"})
    assert runs.load("reuse", auto).folder == imagenet.folder
    assert runs.load("reuse", auto | {"initial": "random"}).folder == run.folder


def test_a_chapter_without_parameters_keeps_its_other_runs():
    save()
    save({})
    assert runs.load("reuse", {}).parameters == {}
    assert len(runs.find("reuse")) == 2


def test_auto_prefers_real_data(store):
    auto = {"digit": 1, "data": "auto"}
    assert runs.load("reuse", auto) is None
    sample = save(auto, card=card("sample"))
    assert sample.parameters == {"digit": 1, "data": "sample"}
    assert runs.load("reuse", auto).parameters["data"] == "sample"
    assert runs.load("reuse", {"digit": 1, "data": "real"}) is None
    real = save(auto, card=card("partial"))
    assert real.parameters == {"digit": 1, "data": "real"}
    assert runs.load("reuse", auto).card.kind == "partial"
    assert runs.load("reuse", {"digit": 1, "data": "sample"}).card.kind == "sample"


@pytest.mark.parametrize(("mode", "expected"), [("read", True), ("", False), ("compute", False), (None, False)])
def test_reading(monkeypatch, mode, expected):
    monkeypatch.delenv("EXPVAE_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("EXPVAE_MODE", mode)
    assert runs.reading() is expected


def test_the_store_is_in_the_repository_unless_said_otherwise(monkeypatch, store):
    assert runs.root() == store
    monkeypatch.delenv("EXPVAE_RUNS")
    assert runs.root() == HERE.parents[1] / "runs"


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("metrics", {"metrics": [runs.row("AUROC", float("nan"))]}),
        ("metrics", {"metrics": [runs.row("AUROC", 0.5, low=float("-inf"))]}),
        ("metrics", {"metrics": [runs.row("AUROC", np.float64("nan"))]}),
        ("metrics", {"metrics": [runs.row("AUROC", 0.5) | {"n": np.int64(3)}]}),
        ("losses", {"losses": {"kl": [1.0, float("inf")]}}),
        ("seconds", {"seconds": {"training": float("nan")}}),
        ("ours", {"extra": {"ours": {"value": float("nan")}}}),
    ],
)
def test_what_json_cannot_hold_is_refused(store, part, changes):
    with pytest.raises(ValueError, match=rf"^{part} of the run digit=1,seed=0 cannot be stored: JSON takes finite"):
        save(**changes)
    assert not store.exists()


@pytest.mark.parametrize("array", [np.array([{}]), np.array([None]), np.zeros(2, [("a", object)])])
def test_arrays_of_objects_are_refused(store, array):
    with pytest.raises(ValueError, match=r"^arrays\['maps'\] of the run digit=1,seed=0 holds Python objects"):
        save(arrays={"curve": np.zeros(3), "maps": array})
    assert not store.exists()


def test_pickles_are_not_read():
    run = save()
    np.savez(run.folder / "arrays.npz", planted=np.array([{}]))
    with pytest.raises(ValueError, match="allow_pickle"):
        _ = run.arrays


@pytest.mark.parametrize("value", ["a/b", "../..", "a,seed=1", "a b", "a\\b", "a\0", "ä", "a:b", "*"])
def test_values_that_are_no_part_of_a_name_are_refused(store, value):
    for act in (save, lambda parameters: runs.load("reuse", parameters)):
        with pytest.raises(ValueError, match=r"^digit='.*' cannot be part of a folder's name; use letters, digits"):
            act({"digit": value})
    assert not store.exists()


class Undrawable(Figure):
    def savefig(self, *arguments, **options):
        raise OSError("No space left on device")


def test_a_failed_save_leaves_the_earlier_run_alone(store):
    before = save(value=0.5)
    kept = {name: (store / name).read_bytes() for name in files(store)}
    with pytest.raises(OSError, match="No space left"):
        save(value=0.75, figures={"panel": panel(), "broken": Undrawable()})
    assert {name: (store / name).read_bytes() for name in files(store)} == kept
    assert sorted(path.name for path in before.folder.parent.iterdir()) == [".lock", "digit=1,seed=0"]


@pytest.mark.parametrize("content", [b"", b'{"chapter": "reuse", "para', b"{}", b"[]", b"null", b'"a"', b"\xff\xfe{}"])
def test_a_damaged_record_is_named(content):
    path = save().folder / "record.json"
    path.write_bytes(content)
    for act in (runs.find, lambda: runs.load("reuse", PARAMETERS)):
        with pytest.raises(
            ValueError, match=r"is damaged \(.*\); delete its folder and run the chapter again"
        ) as caught:
            act()
        assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_in_a_record(number):
    run = save(value=0.8125)
    path = run.folder / "record.json"
    path.write_text(path.read_text().replace("0.8125", number))
    for act in (runs.find, lambda: runs.load("reuse", PARAMETERS)):
        with pytest.raises(
            ValueError, match=rf"{number} is no finite number.*; delete its folder and run the"
        ) as caught:
            act()
        assert str(caught.value).startswith(f"{path} is damaged")
    with pytest.raises(ValueError, match=f"{number} is no finite number"):
        runs.amend(run, {"note": 1})
    assert number in path.read_text()


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def altered(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"curve.npy") + 40] ^= 0xFF
    path.write_bytes(content)


def with_a_text(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "no array")


def with_half_an_array(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("curve.npy", b"\x93NUMPY\x01\x00")


def one_array():
    content = io.BytesIO()
    np.save(content, np.zeros(3))
    return content.getvalue()


DAMAGES = [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"no archive"),
    lambda path: path.write_bytes(b"PK\x03\x04 nor this"),
    lambda path: path.write_bytes(one_array()),
    lambda path: path.write_bytes(one_array()[:20]),
    halved,
    altered,
    with_a_text,
    with_half_an_array,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_damaged_arrays_are_named(damage):
    path = save().folder / "arrays.npz"
    damage(path)
    run = runs.load("reuse", PARAMETERS)
    with pytest.raises(ValueError, match=r"is damaged \(.*\); delete its folder and run the chapter again$") as caught:
        _ = run.arrays
    assert str(caught.value).startswith(f"{path} is damaged")


def test_arrays_damaged_at_any_place_are_named_or_read():
    run = save(arrays={"curve": np.arange(20, dtype=np.float32)})
    path = run.folder / "arrays.npz"
    content = path.read_bytes()
    named = 0
    for damaged in [content[:size] for size in range(0, len(content), 3)] + [
        content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :] for at in range(len(content))
    ]:
        path.write_bytes(damaged)
        try:
            _ = runs.load("reuse", PARAMETERS).arrays
        except ValueError as error:
            assert str(error).startswith(f"{path} is damaged")
            named += 1
    assert named > len(content) // 3


@pytest.mark.parametrize("value", [0.5, 0.75])
def test_arrays_of_another_write_are_never_taken_for_those_of_a_record(value):
    earlier = save(value=0.5)
    content = (earlier.folder / "arrays.npz").read_bytes()
    save(value=0.25)
    with pytest.raises(ValueError, match=r"arrays\.npz has been stored anew since its run was read; load that again$"):
        _ = earlier.arrays
    later = save(value=value)
    (later.folder / "arrays.npz").write_bytes(content)
    if value == 0.5:
        assert later.arrays["curve"][0] == 0.5
    else:
        with pytest.raises(
            ValueError, match=r"arrays\.npz is damaged \(ValueError: its SHA-256 is not that in the rec"
        ):
            _ = later.arrays


def test_runs_from_before_there_was_a_digest_are_read():
    run = save()
    record = json.loads((run.folder / "record.json").read_text())
    assert len(record.pop("arrays_sha256")) == 64
    (run.folder / "record.json").write_text(json.dumps(record))
    assert runs.load("reuse", PARAMETERS).arrays["curve"][0] == 0.5


@pytest.mark.parametrize("part", ["git", "git.dirty", "data.counts", "budget.asked", "losses", "metrics"])
@pytest.mark.parametrize("wrong", [None, "text", 7])
def test_a_record_that_lacks_an_entry_or_has_another_type_is_named(part, wrong):
    path = save().folder / "record.json"
    record = json.loads(path.read_text())
    *above, name = part.split(".")
    holder = record[above[0]] if above else record
    if wrong is None:
        del holder[name]
    else:
        holder[name] = "text" if part == "budget.asked" else wrong
    path.write_text(json.dumps(record))
    if (part, wrong) == ("git.dirty", None):
        assert runs.load("reuse", PARAMETERS).record["git"].keys() == {"commit"}  # None, where there is no checkout
        return
    with pytest.raises(
        ValueError, match=rf"damaged \(ValueError: record\.{part} is not there or something else than it"
    ):
        runs.load("reuse", PARAMETERS)


@pytest.mark.parametrize("row", ['["a", "", "", 1, null, null]', '["a", "", "", "1", null, null, null]', '"AUROC  "'])
def test_a_row_of_a_record_that_is_none_is_named(row):
    path = save().folder / "record.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"metrics": [json.loads(row)]}))
    with pytest.raises(ValueError, match=r"record\.json is damaged \(ValueError: "):
        runs.load("reuse", PARAMETERS)


def test_a_full_disk_keeps_the_stored_run(store, full_disk):
    run = save(value=0.5)
    kept = {name: (store / name).read_bytes() for name in files(store)}
    for act in (lambda: save(value=0.75), lambda: runs.amend(run, {"note": "x" * 999})):
        with (
            full_disk(),
            pytest.raises(OSError, match=rf"^{run.folder}.* could not be written \(.*\); nothing was lost"),
        ):
            act()
        assert {name: (store / name).read_bytes() for name in files(store)} == kept
        assert sorted(path.name for path in run.folder.parent.iterdir()) == [".lock", "digit=1,seed=0"]


# --- where nothing may be written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_lock", [True, False])
def test_a_store_that_may_only_be_read_is_read(with_lock, read_only, open_place, monkeypatch):
    monkeypatch.setenv("EXPVAE_RUNS", str(open_place / "store"))
    folder = save().folder
    if not with_lock:
        (folder.parent / ".lock").unlink()
    before = files(open_place)
    with read_only(open_place / "store"):
        run = runs.load("reuse", PARAMETERS)
        assert run.arrays.keys() == {"curve", "count"}
        assert run.figure("panel").exists()
        assert runs.load("reuse", {"digit": 7}) is None
        assert [one.folder for one in runs.find()] == [folder]
    assert files(open_place) == before


# --- validity --------------------------------------------------------------------------------------------------------


def test_a_run_is_outdated_by_the_version_of_a_protocol_and_by_nothing_else(monkeypatch):
    save(PARAMETERS, "mnist")
    monkeypatch.setitem(MNIST, "report2", dataclasses.replace(MNIST["report2"], learning_rate=5e-4))
    monkeypatch.setitem(protocols.VERSIONS, "RBM", 7)  # a run of this chapter rests on no such machine
    assert runs.load("mnist", PARAMETERS).outdated == []
    monkeypatch.setitem(protocols.VERSIONS, "PIXEL", 8)
    assert runs.load("mnist", PARAMETERS).outdated == ["PIXEL 1, now 8"]
    monkeypatch.delitem(protocols.VERSIONS, "ATTENTION")
    assert runs.load("mnist", PARAMETERS).outdated == ["ATTENTION 1, now gone", "PIXEL 1, now 8"]


def test_a_run_of_an_experiment_without_a_version_is_refused():
    with pytest.raises(ValueError, match="there is no protocol 'nowhere'; there are TRAINING, "):
        save(chapter="nowhere")


@pytest.fixture
def bottles(tmp_path, monkeypatch):
    """Two categories of MVTec AD with a few tiny images each, and what a new process sees of them."""
    folder = tmp_path / "data" / "mvtec"
    for grey, name in enumerate(("train/good/000", "train/good/001", "test/good/000", "test/broken/000")):
        for category in ("bottle", "cable"):
            file = folder / category / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (grey, 0, 0)).save(file)
    monkeypatch.setenv("EXPVAE_DATA", str(tmp_path / "data"))
    runs._data_digest.cache_clear()
    yield folder
    runs._data_digest.cache_clear()


def seen_by_a_new_process():
    runs._data_digest.cache_clear()
    return runs.load("reuse", PARAMETERS).of_data_at_hand


def test_a_run_answers_for_its_own_state_of_a_category_alone(bottles):
    category = mvtec.load("bottle", "real", size=32)
    assert category.card.name == "mvtec/bottle"
    save(card=category.card)
    assert seen_by_a_new_process()
    Image.new("RGB", (40, 40), (0, 9, 0)).save(bottles / "cable" / "train/good/000.png")
    (bottles / "cable" / "test/broken/000.png").unlink()
    assert seen_by_a_new_process()

    image = bottles / "bottle" / "train/good/000.png"
    before = image.read_bytes()
    Image.new("RGB", (40, 40), (0, 9, 0)).save(image)
    assert not seen_by_a_new_process()
    image.write_bytes(before)
    assert seen_by_a_new_process()
    image.with_name("002.png").write_bytes(before)
    assert not seen_by_a_new_process()


def test_where_a_category_is_not_at_hand_there_is_no_telling(bottles):
    save(card=mvtec.load("bottle", "real", size=32).card)
    (bottles / "bottle").rename(bottles / "elsewhere")
    assert seen_by_a_new_process()


def test_a_run_on_the_drawn_sample_of_a_category_answers_anywhere(bottles):
    save(card=mvtec.load("bottle", "sample", size=32).card)
    assert seen_by_a_new_process()


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["record", "arrays", "figure"])
def test_a_reader_finds_the_run_while_a_writer_is_between_its_two_renames(part):
    run = save()
    run.folder.rename(run.folder.with_name(f".old-{run.folder.name}"))
    if part == "record":
        assert runs.load("reuse", PARAMETERS).parameters == PARAMETERS
    elif part == "arrays":
        assert run.arrays.keys() == {"curve", "count"}
    else:
        assert run.figure("panel").exists()


def test_a_run_is_found_that_is_renamed_while_the_store_is_listed(monkeypatch):
    folder, glob = save().folder, Path.glob

    def listed(path, pattern):
        found = list(glob(path, pattern))
        if folder.exists():
            folder.rename(folder.with_name(f".old-{folder.name}"))
            return [one for one in found if one != folder]  # as scandir does at that moment
        return found

    monkeypatch.setattr(Path, "glob", listed)
    assert [run.folder for run in runs.find("reuse")] == [folder]


def test_a_file_beside_the_runs_is_no_run(store):
    save()
    (store / "reuse" / "notes.txt").write_text("no run")
    assert len(runs.find()) == 1


def test_a_reader_looks_again_where_a_writer_was_faster(monkeypatch):
    folder = save().folder
    places = iter([folder.with_name(".old-gone"), folder])
    monkeypatch.setattr(whole, "located", lambda _: next(places))
    assert runs.load("reuse", PARAMETERS).parameters == PARAMETERS


class KilledError(BaseException):
    pass


def killed_between_the_renames(end):
    """Save a run in the place of another; `end` is called when the old one is set aside and the new one not there."""
    rename = Path.rename

    def renamed(path, target):
        if path.name.startswith(".writing-"):
            end()
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", renamed)
        save(value=0.75)


def killed(how):
    if how == "raised":

        def end():
            raise KilledError

        with pytest.raises(KilledError):
            killed_between_the_renames(end)
    else:
        code = f"import os, {HERE.stem} as t; t.killed_between_the_renames(lambda: os._exit(9))"
        assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=False).returncode == 9


@pytest.mark.parametrize("how", ["raised", "killed"])
def test_a_kill_between_the_two_renames_leaves_a_run_that_is_found(how, store):
    folder = save(value=0.5).folder
    killed(how)
    assert not folder.exists()
    (found,) = runs.find("reuse")
    assert found.metric("AUROC", "ours", "digit 7")["value"] == 0.5
    assert found.folder == folder == runs.load("reuse", PARAMETERS).folder
    assert found.arrays["curve"][0] == 0.5
    assert found.figure("panel").exists()
    runs.amend(found, {"note": 1})
    assert runs.load("reuse", PARAMETERS).record == found.record | {"note": 1}

    killed("raised")
    assert runs.load("reuse", PARAMETERS).metric("AUROC", "ours", "digit 7")["value"] == 0.5
    killed("raised")
    assert save(value=0.25).metric("AUROC", "ours", "digit 7")["value"] == 0.25
    (found,) = runs.find("reuse")
    assert found.arrays["curve"][0] == 0.25
    assert [path.name for path in folder.parent.iterdir() if not path.name.startswith(".writing-")] in (
        [".lock", folder.name],
        [folder.name, ".lock"],
    )


def test_a_kill_between_the_two_renames_is_no_hindrance_where_a_store_may_only_be_read(
    read_only, open_place, monkeypatch
):
    monkeypatch.setenv("EXPVAE_RUNS", str(open_place / "store"))
    save(value=0.5)
    killed("raised")
    with read_only(open_place / "store"):
        for run in (*runs.find("reuse"), runs.load("reuse", PARAMETERS)):
            assert run.metric("AUROC", "ours", "digit 7")["value"] == 0.5
            assert run.arrays["curve"][0] == 0.5
            assert run.figure("panel").exists()


def write_often(name, value, count):
    """Save the same run many times, from the moment that the file `go` is there."""
    (runs.root() / f"{name}.ready").touch()
    while not (runs.root() / "go").exists():
        time.sleep(0.005)
    for number in range(count):
        save(value=value + 2 * number, figures={})


def test_two_writers_and_a_reader(store):
    save(value=0.0)
    values = (1.0, 2.0)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", f"import {HERE.stem}; {HERE.stem}.write_often('{value}', {value}, 20)"],
            cwd=HERE.parent,
        )
        for value in values
    ]
    try:
        limit = time.monotonic() + 300
        while len(list(store.glob("*.ready"))) < 2:
            assert all(writer.poll() is None for writer in writers)
            assert time.monotonic() < limit
            time.sleep(0.02)
        (store / "go").touch()
        seen = set()
        while any(writer.poll() is None for writer in writers):
            run = runs.load("reuse", PARAMETERS)
            assert len(runs.find("reuse")) == 1
            seen.add(value := run.metric("AUROC", "ours", "digit 7")["value"])
            try:
                assert np.unique(run.arrays["curve"]).item() == value
            except ValueError as error:
                assert "has been stored anew since its run was read" in str(error)
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [writer.returncode for writer in writers] == [0, 0]
    written = {value + 2 * number for value in values for number in range(20)}
    assert seen & written
    assert seen <= {0.0, *written}

    (run,) = runs.find("reuse")
    value = run.metric("AUROC", "ours", "digit 7")["value"]
    assert value in {value + 2 * 19 for value in values}
    assert np.unique(run.arrays["curve"]).tolist() == [value]
    assert read_record(run.folder) == run.record
    assert sorted(path.name for path in run.folder.parent.iterdir()) == [".lock", "digit=1,seed=0"]
