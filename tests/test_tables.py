"""The tables of the MVTec chapters, from runs made up here."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from expvae.metrics import CONVENTIONS
from expvae_book import names, publications, tables
from expvae_book.data.card import DataCard
from expvae_book.names import ATTENTION, BASELINES, METHODS
from expvae_book.pages import sanity
from expvae_book.runs import Run, row

AUROC = {"bottle": 0.6, "metal_nut": 0.4}
SHOWN = "layer2.1.conv1, liu2020_code"
# Those of all layers by the preset of the authors' code, but the first, and one by the paper's.
MAPS = [f"{layer}, liu2020_code" for layer in names.LAYERS[1:]] + [f"{names.LAYERS[4]}, liu2020_paper"]


def interval(metric, value, method="", subset="", width=0.05):
    return row(metric, value, method, subset, low=value - width, high=value + width, n=10)


def make_run(category, *, masks=True):
    """A run of a category; its numbers follow from AUROC and from the place of each method and convention."""
    base = AUROC[category]
    metrics = [row("parameters", 72_803_363), row("KL per image", 12.3), row("reconstruction per image", 1000.0)]
    metrics += [row("reconstruction per image, mean image", 2000.0), row("active units", 7)]
    if masks:
        metrics += [row("anomalous pixels", 0.1), row("anomalous pixels", 0.2, subset="defective images")]
        method = {ATTENTION: SHOWN, names.COMMON: f"mean of {SHOWN}"}
        for place, name in enumerate(method.get(name, name) for name in METHODS):
            metrics.append(interval("pixel AUROC", base + place / 100, name))
            metrics.append(interval("AUPRO", base / 2, name))
            metrics.append(interval(names.MISSED, 0.3 if category == "bottle" else 0.7, name))
        for place, name in enumerate(BASELINES):
            metrics.append(interval(names.DIFFERENCE, 0.1 * (place - 2), f"{SHOWN} − {method.get(name, name)}"))
        metrics.append(interval("best IoU (oracle)", 0.1, SHOWN))
        for place, (average, classes) in enumerate(CONVENTIONS):
            metrics += [
                interval(f"IoU, {average}, {classes}", base + place / 10, SHOWN, choice) for choice in tables.CHOICES
            ]
        metrics.append(row(names.SHARED, 0.9, SHOWN))
        for name, value in (("edges", 0.2), ("SSIM", -0.7), ("brightness", 0.8), ("centre prior", 0.5)):
            metrics.append(row(names.RESEMBLES, value, name, SHOWN))
        metrics.append(row(names.RESEMBLES, 0.99, "edges", MAPS[0]))
        for kind, value in (("small_hole", 0.2), ("crack", 0.9)):
            metrics.append(row("AUROC within images, mean", value, SHOWN, kind))
        metrics += [interval("pixel AUROC", base, name) for name in MAPS if name != SHOWN]
    record = {
        "metrics": metrics,
        "maps": MAPS if masks else [],
        "budget": {"unit": "images", "asked": 3_000_000, "used": 4000},
        "training": {"encoder": "random, fine-tuned", "precision": "bfloat16", "originals": 160},
        "data": asdict(DataCard("mvtec/bottle", "partial", {}, {}, "digest", "licence", "credit")),
    }
    return Run("mvtec", {"category": category}, record, Path("nowhere"))


def shown(run):
    return run.at(*SHOWN.split(", "))


@pytest.fixture
def jobs():
    return {"bottle": make_run("bottle"), "carpet": None, "metal_nut": make_run("metal_nut")}


@pytest.fixture
def found(jobs):
    """The jobs as the pages show them."""
    return {category: run and shown(run) for category, run in jobs.items()}


def test_results_stand_beside_the_published_ones_and_missing_categories_stay(found):
    table = tables.results("R2", found).set_index("Category")
    assert table.index.tolist() == ["bottle", "carpet", "metal nut", "mean of 2"]
    bottle = table.loc["bottle"]
    assert (bottle["pixel AUROC, Liu et al. 2020"], bottle["pixel AUROC, Report 2"]) == ("0.87", "0.7")
    assert bottle["pixel AUROC, ours"] == "0.600 [0.550, 0.650]"
    assert (bottle["Trained on"], bottle["Data"]) == ("4,000 of 3,000,000 images", "partial")
    carpet = table.loc["carpet"]
    assert carpet["pixel AUROC, ours"] == carpet["IoU, ours"] == tables.NO_RUN
    assert (carpet["Trained on"], carpet["IoU, Report 2"]) == ("", "0.51")
    mean = table.iloc[-1]
    assert mean["pixel AUROC, ours"] == "0.500"
    assert mean["IoU, Report 2"] == f"{np.mean([0.46, 0.43]):.3f}"  # of bottle and metal nut alone


def test_a_category_of_the_other_protocol_has_no_published_number(found):
    table = tables.results("R1", found).set_index("Category")
    assert table.loc["bottle", "pixel AUROC, Report 1"] == table.loc["bottle", "pixel AUROC, Liu et al. 2020"] == ""
    assert table.loc["metal nut", "pixel AUROC, Report 1"] == "0.78"
    assert table.iloc[-1]["pixel AUROC, Report 1"] == "0.780"


def test_a_part_of_ones_own_has_a_line_and_counts_in_no_mean(found, monkeypatch):
    monkeypatch.setitem(AUROC, "my_part", 0.9)
    table = tables.results("R2", found | {"my_part": shown(make_run("my_part"))}).set_index("Category")
    line = table.loc["my part"]
    assert line["pixel AUROC, ours"] == "0.900 [0.850, 0.950]"
    assert not line[["pixel AUROC, Liu et al. 2020", "IoU, Report 2"]].any()
    assert table.loc["mean of 2", "pixel AUROC, ours"] == "0.500"


def test_a_category_without_masks_says_so(found):
    found["bottle"] = make_run("bottle", masks=False)
    table = tables.results("R2", found).set_index("Category")
    assert table.loc["bottle", "pixel AUROC, ours"] == "no masks"
    assert table.index[-1] == "mean of 1"
    assert tables.methods(found, "pixel AUROC")["Category"].tolist() == ["metal nut", "mean"]
    assert tables.missed(found) == (10, 7)
    assert len(tables.learned(found)) == 2


def test_nothing_to_show_gives_empty_tables():
    nothing = {"carpet": None}
    for table in (
        tables.methods(nothing, "pixel AUROC"),
        tables.conventions(nothing, "R2"),
        tables.trivial(nothing, "R2"),
        tables.failures(nothing),
        tables.learned(nothing),
        tables.layers(nothing),
    ):
        assert table.empty
    assert tables.missed(nothing) == (0, 0)
    assert tables.orders(nothing)["above"].tolist() == [0] * len(BASELINES)


def test_methods_and_orders(found):
    table = tables.methods(found, "pixel AUROC").set_index("Category")
    assert table.loc["bottle", BASELINES[0]] == "0.61 [0.56, 0.66]"
    assert table.loc["mean", BASELINES[0]] == "0.510"
    orders = tables.orders(found).set_index("Attention against")
    told = orders[["above", "not told apart from", "below"]].to_numpy().tolist()
    assert told == [[0, 0, 2], [0, 0, 2], [0, 2, 0], [2, 0, 0], [2, 0, 0]]
    assert orders["Mean difference"].tolist() == ["-0.200", "-0.100", "+0.000", "+0.100", "+0.200"]


def test_conventions_and_their_distance_from_the_published_numbers(found):
    table = tables.conventions(found, "R2")
    assert len(table) == len(CONVENTIONS) * len(tables.CHOICES)
    first = table.iloc[0]
    assert (first["IoU of"], first["Averaged"]) == ("anomalous class", "pooled")
    assert (first["Ours, mean"], first["Ours, range"]) == ("0.500", "0.400–0.600")
    paper, report = {"bottle": 0.27, "metal_nut": 0.49}, {"bottle": 0.46, "metal_nut": 0.43}
    for source, given in (("Liu et al. 2020", paper), ("Report 2", report)):
        distance = np.mean([abs(AUROC[category] - given[category]) for category in AUROC])
        assert first[f"Distance from {source}"] == f"{distance:.3f}"


def test_flagging_everything_or_nothing_beside_the_published_iou(found):
    table = tables.trivial(found, "R2").set_index("Category")
    bottle = table.loc["bottle"]
    assert bottle["Anomalous class, everything flagged"] == "0.100"
    assert bottle["Both classes, nothing flagged"] == "0.450"
    assert bottle["Both classes, nothing flagged, defective images"] == "0.400"
    assert bottle["IoU, Report 2"] == "0.46"


def test_models_that_cost_more_than_the_mean_image_are_named(found):
    assert tables.dear(found) == []
    costly = shown(make_run("metal_nut"))
    costly.record["metrics"] = [
        line | {"value": 2500.0} if line["metric"] == "reconstruction per image" else line
        for line in costly.record["metrics"]
    ]
    assert tables.dear(found | {"metal_nut": costly}) == ["metal nut"]


def test_failures_name_the_strongest_resemblances_and_the_kinds_of_defects(found):
    table = tables.failures(found).set_index("Category")
    bottle = table.loc["bottle"]
    assert bottle["Maps that miss the defect"] == "30% [25%, 35%]"
    assert bottle["Variance of the maps that all images share"] == "90%"
    assert bottle["Resembles most"] == "brightness (+0.80), SSIM (-0.70), centre prior (+0.50)"
    assert (bottle["Worst kind of defect"], bottle["Best kind of defect"]) == ("small hole (0.20)", "crack (0.90)")


def test_layers_and_presets_in_one_table(jobs):
    table = tables.layers(jobs).set_index("Layer")
    assert table.index.tolist() == list(names.LAYERS)
    assert table.columns.tolist() == ["authors' code", "paper's rule"]
    assert table.loc["layer1.0.conv2", "authors' code"] == "0.500 (0.40–0.60)"
    assert table.loc["layer3.1.conv2"].tolist() == ["0.500 (0.40–0.60)"] * 2
    assert table.loc["layer4.1.conv2", "paper's rule"] == table.loc["conv1", "authors' code"] == ""


def test_every_category_has_a_line_on_mirroring():
    table = tables.mirroring(["pill", "metal_nut", "toothbrush"])
    assert table["Category"].tolist() == ["pill", "metal nut", "toothbrush"]
    assert table[["Left and right", "Top and bottom"]].to_numpy().tolist() == [
        ["no", "no"],
        ["no", "no"],
        ["yes", "no"],
    ]


def test_the_papers_line_in_the_literature_is_the_mean_of_its_table():
    table = tables.literature().set_index("Method")
    given = publications.read()
    given = given[(given["source"] == "paper") & (given["quoted_by"] == "R2") & (given["metric"] == "pixel AUROC")]
    given = given[given["dataset"] == "MVTec AD"]
    assert table.loc["VAE, gradient attention", "Pixel AUROC"] == f"{given['value'].mean():.3f}"
    assert len(given) == 15


def test_the_second_reports_runs_are_all_there():
    table = publications.report2_runs()
    runs = table.groupby(["gamma", "lambda", "seed"])["step"]
    assert runs.ngroups == 50
    assert runs.max().unstack("lambda").max().to_dict() == {0: 300_000, 0.5: 150_000, 1: 150_000, 1.5: 150_000}
    assert (table["step"] == runs.cumcount().add(1) * 1500).all()
    scores = table[table["step"] == 150_000].groupby("lambda")["metric_score"]
    stated = {0: (0.761, 0.095, 10), 0.5: (0.718, 0.071, 10), 1: (0.769, 0.054, 20), 1.5: (0.757, 0.059, 10)}
    found = scores.agg(["mean", "std", "size"]).round(3)
    assert {weight: tuple(row) for weight, row in zip(found.index, found.to_numpy(), strict=True)} == stated


def test_a_file_that_holds_no_runs_says_so(tmp_path):
    file, head = tmp_path / "runs.csv", "gamma,lambda,seed,step,metric_score\n"
    file.write_text("gamma,lambda\n10,1\n")
    with pytest.raises(ValueError, match=r"runs\.csv: the columns must be gamma,lambda,seed,step,metric_score"):
        publications.report2_runs(file)
    for rows in ("10,,1,1500,1.5\n", "10,,1,1500,\n", "10,,1,1500,0.5\n10,0,1,1500,0.6\n"):
        file.write_text(head + rows)
        with pytest.raises(ValueError, match=r"runs\.csv: every run needs one metric_score in \[0, 1\]"):
            publications.report2_runs(file)


def test_untrained_networks_are_summed_up(monkeypatch):
    subset = "random, seed {}"
    rows = [row("pixel AUROC", 0.6 + 0.1 * seed, SHOWN, subset.format(seed)) for seed in range(3)]
    rows += [row("pixel AUROC", 0.1, SHOWN, "random, seed 0, mean 0 and variance 1"), row("pixel AUROC", 0.9, SHOWN)]
    run = make_run("bottle", masks=False)
    run.record["metrics"] = rows
    monkeypatch.setattr(tables.runs, "find", lambda chapter, **wanted: [run] if wanted["category"] == "bottle" else [])
    where = ("layer2.1.conv1", "liu2020_code")
    told = tables.untrained_text("pixel AUROC", *where, dataset="mvtec", category="bottle")
    assert told == "0.700 (3 networks, 0.600–0.800)"
    assert tables.untrained_text("pixel AUROC", *where, category="pill") == tables.NOT_MEASURED
    assert tables.untrained_text("AUPRO", *where, category="bottle") == tables.NOT_MEASURED
    table = tables.untrained(replace(run, record=run.record | {"metrics": rows[:4]}))
    assert table.iloc[0].tolist() == [SHOWN, "random", "0.700", "0.600", "0.800", 3]
    assert table.iloc[1].tolist() == [SHOWN, "random, mean 0 and variance 1", "0.100", "0.100", "0.100", 1]


def test_a_cascade_stands_between_two_trainings_and_two_random_networks():
    generator = np.random.default_rng(0)
    seeds = []
    for seed in (0, 1):
        run = make_run("bottle", masks=False)
        run.parameters["seed"] = seed
        run.record["metrics"] = [
            row("pixel AUROC", 0.7, SHOWN, "random nothing"),
            row("pixel AUROC", 0.6 + seed / 10, SHOWN, "random from the latents to conv1"),
            row(names.KEPT_RANKS, 0.25, SHOWN, "random from the latents to latents"),
            row(names.KEPT_RANKS, 0.125, SHOWN, "random from the latents to conv1"),
            row(names.KEPT_RANKS, 0.75, SHOWN, "random from the image to conv1"),
            row(names.KEPT_RANKS, -0.5, SHOWN, names.FLOOR),
        ]
        run.__dict__["arrays"] = {f"compared/{SHOWN}": generator.random((4, 5, 5)), f"compared/{SHOWN}, peak": 1.0}
        seeds.append(run)
    maps = (run.arrays[f"compared/{SHOWN}"].reshape(4, -1) for run in seeds)
    expected = np.mean([spearmanr(a, b).statistic for a, b in zip(*maps, strict=True)])
    (line,) = sanity.cascade(seeds).to_numpy().tolist()
    assert line == [SHOWN, 2, "0.700", "0.650", "+0.25", "+0.12", f"{expected:+.2f}", "-0.50"]
    assert sanity.cascade(seeds[:1]).to_numpy().tolist()[0][2:] == ["0.700", "0.600", "+0.25", "+0.12", "", "-0.50"]
