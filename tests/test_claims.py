import csv
import json
import math
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import scipy.stats
from bs4 import BeautifulSoup
from pybtex.database import parse_file

from expvae_book import judges, judging, matching, publications, report, sprite_judges
from expvae_book.claims import CLAIMS
from expvae_book.data.card import DataCard
from expvae_book.matching import NO_RUN, PRESETS, beside, comparable
from expvae_book.publications import COLUMNS, read
from expvae_book.recipes import MNIST
from expvae_book.report import to_html, wide
from expvae_book.runs import Run, row

BOOK = Path(__file__).resolve().parents[1] / "book"
PAPER, CODE = "attention, paper", "attention, authors' code"


COUNTS = {"train": 60000, "test": 10000}


def make_run(
    digit=1, seed=0, *, metrics=(), kind="complete", used=100, outdated=False, recipe="liu2020", chapter="mnist"
):
    parameters = {"digit": digit, "recipe": recipe, "seed": seed, "epochs": used, "data": "real"}
    record = {
        "metrics": list(metrics),
        "budget": {"unit": "epochs", "asked": 100, "used": used},
        "recipe": json.loads(json.dumps(asdict(MNIST["liu2020"]))),
        "seconds": {"training": 3725.0},
        "device": "cpu: 8 threads",
        "weights": {"key": "abc", "device": "cpu: 2 threads"},
        "data": asdict(DataCard("mnist", kind, COUNTS, COUNTS, "digest", "licence", "credit")),
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "protocols": {"PIXEL": 0} if outdated else {},
    }
    return Run(chapter, parameters, record, Path("nowhere"))


def share(value, low, high, method=CODE):
    return row("less intuitive maps", value, method, "all outliers", low=low, high=high)


def pixel_rows(method, low, high, *, baseline_high=0.7, random=(0.49, 0.51)):
    intervals = {method: (low, high), "random": random, "input intensity": (baseline_high - 0.1, baseline_high)}
    intervals["centre prior"] = (0.55, 0.56)
    return [
        row("pixel AUROC", (low + high) / 2, name, "all outliers", low=low, high=high)
        for name, (low, high) in intervals.items()
    ]


def published_share():
    """The published share of less intuitive maps, the one number on the MNIST maps."""
    table = read()
    return table[table["table"] == "mnist"]


def claim(name):
    return next(claim for claim in CLAIMS if claim.id == name)


# Published numbers


def test_every_number_has_a_source_that_can_be_cited():
    table = read()
    assert set(table["table"]) == {"datasets", "dsprites", "mnist", "mvtec", "training", "ucsd"}
    assert set(table["source"]) == set(publications.SOURCES)
    assert not table[["where", "metric", "dataset", "published"]].eq("").any(axis=None)
    keys = set(parse_file(BOOK / "references.bib").entries)
    assert {"liu2020", "report1", "report2", "brongers2021", "expvae_code"} <= keys
    # A report speaks for itself; only the paper is quoted by others.
    own = table["source"].isin(["R1", "R2"])
    assert (table.loc[own, "source"] == table.loc[own, "quoted_by"]).all()


# Typed from the texts of the reports and the notes on the published code in a second reading.
@pytest.mark.parametrize(
    ("source", "quoted_by", "dataset", "setting", "metric", "value"),
    [
        ("R1", "R1", "UCSD Ped1", "conv3", "pixel AUROC", 0.58),
        ("paper", "R1", "UCSD Ped1", "conv1", "pixel AUROC", 0.89),
        ("R2", "R2", "UCSD Ped1", "conv1", "pixel AUROC", 0.8731),
        ("R1", "R1", "MVTec AD", "metal nut", "IoU", 0.242),
        ("paper", "R1", "MVTec AD", "capsule", "pixel AUROC", 0.74),
        ("R1", "R1", "MVTec AD", "cable", "pixel AUROC", 0.27),
        ("R2", "R2", "MVTec AD", "hazelnut", "IoU", 0.60),
        ("R2", "R2", "MVTec AD", "zipper", "pixel AUROC", 0.67),
        ("paper", "R2", "MVTec AD", "grid", "IoU", 0.02),
        ("paper", "R2", "MVTec AD", "screw", "pixel AUROC", 0.97),
        ("R1", "R1", "MNIST", "VAE", "parameters", 13_216_193),
        ("R1", "R1", "UCSD Ped1", "VAE", "parameters", 77_243_073),
        ("R1", "R1", "MVTec AD", "VAE", "parameters", 72_803_363),
        ("R1", "R1", "MVTec AD", "VAE", "GPU time", 8 * 3600 + 5 * 60 + 46),
        ("R2", "R2", "MVTec AD", "VAE", "batch size", 16),
        ("R2", "R2", "UCSD Ped1", "", "test frames", 3400),
        ("R1", "R1", "MVTec AD", "ten categories", "maps that miss the anomaly", 70),
        (
            "brongers",
            "facts sheet",
            "dSprites",
            "AD-FactorVAE, γ 40, λ 20, first conv, seed 2",
            "disentanglement metric",
            0.8713,
        ),
        ("paper", "facts sheet", "dSprites", "β-VAE, β 16", "reconstruction loss", 111),
    ],
)
def test_numbers_are_those_of_the_texts(source, quoted_by, dataset, setting, metric, value):
    table = read()
    found = table[
        (table["source"] == source)
        & (table["quoted_by"] == quoted_by)
        & (table["dataset"] == dataset)
        & (table["setting"] == setting)
        & (table["metric"] == metric)
    ]
    assert found["value"].tolist() == [value]


def test_ranges_are_those_of_the_texts():
    table = read()
    less_intuitive = table[table["metric"] == "less intuitive maps"].iloc[0]
    assert (less_intuitive["source"], less_intuitive["low"], less_intuitive["high"]) == ("R1", 10, 15)
    assert math.isnan(less_intuitive["value"])
    figure = table[table["note"].str.contains("third party") & (table["metric"] == "disentanglement metric")]
    assert len(figure) == 4 + 4 + 6
    assert (figure["high"] - figure["value"]).round(9).eq(0.02).all()
    assert (figure["value"] - figure["low"]).round(9).eq(0.02).all()


def test_both_reports_quote_the_same_numbers_of_the_paper():
    paper = read().query("source == 'paper' and metric in ['pixel AUROC', 'IoU']")
    values = paper.pivot_table("value", ["dataset", "setting", "metric"], "quoted_by").dropna()
    assert len(values) == 2 * 10 + 1  # ten categories, and conv2 on UCSD
    assert (values["R1"] == values["R2"]).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"source": "R3"}, "source='R3' must be one of: paper, R1, R2, brongers, authors-code"),
        ({"quoted_by": "hearsay"}, "quoted_by='hearsay' must be one of: R1, R2, facts sheet"),
        ({"where": ""}, "where is blank"),
        ({"metric": ""}, "metric is blank"),
        ({"value": "o.58"}, "value='o.58' is not a finite number"),
        ({"value": "nan"}, "value='nan' is not a finite number"),
        ({"low": "0.1"}, "low and high must be given together"),
        ({"value": ""}, "it needs a value, or low and high"),
        ({"low": "0.6", "high": "0.7"}, "low, value and high must rise: 0.6, 0.58, 0.7"),
        ({"our_metric": "pixel AUROC"}, "our_metric needs a chapter"),
        ({"our_subset": "all outliers"}, "our_method, our_subset and our_parameters need our_metric"),
        (
            {"chapter": "ucsd", "our_metric": "pixel AUROC", "our_parameters": "layer:conv1"},
            "our_parameters='layer:conv1' must be name=value pairs, separated by ';'",
        ),
    ],
)
def test_a_bad_row_is_rejected_with_its_file_and_line(tmp_path, change, sentence):
    good = dict.fromkeys(COLUMNS, "") | {
        "source": "R1",
        "quoted_by": "R1",
        "where": "Table 3",
        "dataset": "UCSD Ped1",
        "metric": "pixel AUROC",
        "value": "0.58",
    }
    write(tmp_path / "ucsd.csv", [good])
    assert read(tmp_path)["value"].tolist() == [0.58]
    write(tmp_path / "ucsd.csv", [good, good | change])
    with pytest.raises(ValueError, match=r"^ucsd.csv line 3: ") as error:
        read(tmp_path)
    assert str(error.value) == f"ucsd.csv line 3: {sentence}"
    write(tmp_path / "ucsd.csv", [good, good])
    with pytest.raises(ValueError, match=r"^ucsd.csv line 3: it repeats ucsd.csv line 2$"):
        read(tmp_path)


def test_bad_files_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="no CSV file of published numbers"):
        read(tmp_path)
    (tmp_path / "ucsd.csv").write_text("source,value\n")
    with pytest.raises(ValueError, match=r"^ucsd.csv line 1: the columns must be source,quoted_by"):
        read(tmp_path)
    (tmp_path / "ucsd.csv").write_text(",".join(COLUMNS) + "\nR1,R1\n")
    with pytest.raises(ValueError, match=r"^ucsd.csv line 2: it has 2 cells and needs 16$"):
        read(tmp_path)


def write(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ({"value": "0.10"}, "0.10"),
        ({"value": "13216193"}, "13,216,193"),
        ({"low": "10", "high": "15", "unit": "%"}, "10–15 %"),
        ({"low": "-30", "high": "30", "unit": "degrees"}, "-30 to 30 degrees"),
        ({"value": "0.75", "low": "0.73", "high": "0.77"}, "0.75 (0.73–0.77)"),
        ({"value": "4971", "unit": "s"}, "1 h 22 min 51 s"),
        ({"low": "144000", "high": "288000", "unit": "s"}, "40 h to 80 h"),
    ],
)
def test_published_numbers_keep_their_digits(tmp_path, cells, text):
    start = {"source": "R1", "quoted_by": "R1", "where": "Table 3", "dataset": "UCSD Ped1", "metric": "some"}
    write(tmp_path / "some.csv", [dict.fromkeys(COLUMNS, "") | start | cells])
    assert read(tmp_path)["published"].tolist() == [text]


# Ours beside them


def test_without_runs_every_row_says_so():
    table = read()
    lines = beside(table, [])
    assert len(lines) == len(table)
    of_category = lines["our_parameters"].str.contains("category=")
    assert set(lines.loc[~of_category, "ours"]) == {NO_RUN}
    assert lines.loc[of_category, "ours"].str.startswith(f"{NO_RUN}; python -m expvae_book.data fetch mvtec").all()
    assert lines["published"].tolist() == table["published"].tolist()


def test_outdated_runs_stand_behind_current_ones():
    old = ucsd_job({"conv3": (0.1, 0.2)}, presets=("liu2020_paper",))
    old.record["protocols"] = {"PIXEL": 0}
    new = ucsd_job({"conv3": (0.7, 0.8)}, presets=("liu2020_code",))
    lines = beside(read(), [old, new])
    lines = lines[(lines["dataset"] == "UCSD Ped1") & (lines["setting"] == "conv3") & (lines["source"] == "R1")]
    assert ["0.150" in text and "outdated" in text for text in lines["ours"]] == [False, True]


def test_several_seeds_share_a_line_with_mean_range_and_count():
    runs = [
        make_run(seed=seed, metrics=[share(value, value - 0.02, value + 0.02)])
        for seed, value in enumerate((0.1, 0.14, 0.18))
    ]
    (line,) = beside(published_share(), runs).to_dict("records")
    assert line["ours"] == "14.0 % (3 runs, 10.0–18.0)"


def test_one_run_has_its_interval():
    (line,) = beside(published_share(), [make_run(metrics=[share(0.1234, 0.101, 0.145)])]).to_dict("records")
    assert line["ours"] == "12.3 % (10.1–14.5)"


def test_configurations_are_not_averaged_and_are_told_apart():
    runs = [make_run(digit, metrics=[share(value, value, value)]) for digit, value in ((1, 0.1), (3, 0.3))]
    runs.append(make_run(3, kind="partial", metrics=[share(0.5, 0.4, 0.6)]))
    lines = beside(published_share(), runs)
    assert lines["ours"].tolist() == [
        "digit=1: 10.0 % (10.0–10.0)",
        "digit=3: 30.0 % (30.0–30.0)",
        "digit=3: 50.0 % (40.0–60.0) · partial data",
    ]
    (reading,) = wide(lines).to_dict("records")
    assert reading["Ours"].splitlines() == lines["ours"].tolist()
    assert reading["Report 1"] == "10–15 %"


def test_other_methods_subsets_and_missing_values_do_not_match():
    metrics = [share(0.2, 0.1, 0.3, PAPER), row("less intuitive maps", 0.2, CODE, "digit 7")]
    empty = make_run(metrics=[row("less intuitive maps", None, CODE, "all outliers")])
    elsewhere = make_run(metrics=[share(0.2, 0.1, 0.3)], chapter="ucsd")
    lines = beside(published_share(), [make_run(metrics=metrics), empty, elsewhere])
    assert lines["ours"].tolist() == [NO_RUN]


def test_samples_are_left_out_and_weak_runs_are_marked():
    metrics = [share(0.2, 0.1, 0.3)]
    assert beside(published_share(), [make_run(kind="sample", metrics=metrics)])["ours"].tolist() == [NO_RUN]
    weak = [make_run(seed=seed, kind="partial", used=20, outdated=seed == 1, metrics=metrics) for seed in (0, 1)]
    (line,) = beside(published_share(), weak).to_dict("records")
    assert line["ours"] == "20.0 % (2 runs) · partial data · 20 of 100 epochs · 1 of 2 outdated"
    (line,) = beside(published_share(), weak[1:]).to_dict("records")
    assert line["ours"] == "20.0 % (10.0–30.0) · partial data · 20 of 100 epochs · outdated"


def test_entries_of_the_record_stand_beside_hyper_parameters():
    run = make_run(metrics=[row("parameters", 13_216_193)])
    other = make_run(digit=3)
    for made in (run, other):
        del made.record["seconds"]["training"]
    lines = beside(read(), [run, other])
    lines = lines[(lines["dataset"] == "MNIST") & (lines["source"] == "R1")].set_index("metric")
    assert lines.loc["parameters", "ours"] == lines.loc["parameters", "published"] == "13,216,193"
    assert lines.loc["batch size", "ours"] == "128"
    assert lines.loc["epochs", "ours"] == "100"
    assert lines.loc["learning rate", "ours"] == "0.001"
    assert lines.loc["training images", "ours"] == "60,000"
    assert lines.loc["latents", "ours"] == "32"
    assert lines.loc["GPU time", "ours"] == NO_RUN  # the records do not have it
    lines = beside(read(), [make_run()])
    assert "1 h 2 min 5 s · cpu: 2 threads" in lines["ours"].tolist()


def test_tables_show_the_papers_number_once_and_no_nan():
    lines = beside(read(), [])
    table = wide(lines[lines["table"] == "mvtec"])
    carpet = table[(table["Setting"] == "carpet") & (table["Quantity"] == "IoU")].iloc[0]
    assert (carpet["Liu et al. 2020"], carpet["Report 1"], carpet["Report 2"]) == ("0.10", "0.007", "0.51")
    assert "Brongers et al." not in table
    page = to_html(report.listing(lines), "All <numbers>")
    assert "nan" not in page.lower()
    assert page.count("<tr") == len(lines) + 1
    assert "<em>All &lt;numbers&gt;</em>" in page


def test_html_keeps_long_texts_and_line_breaks():
    page = to_html(pd.DataFrame({"A": ["word " * 40 + "end", "one\ntwo & three", None]}), "C")
    assert "word end" in page
    assert "one<br>two &amp; three" in page
    assert page.index("<em>C</em>") < page.index('<div style="overflow-x: auto"')


# Verdicts


def test_cells_that_name_pages_become_links():
    table = pd.DataFrame({"Claim": ["rbm & more", "mnist"], "Chapter": ["rbm", "mnist"]})
    body = to_html(table, "caption", pages="Chapter")
    assert [f'<a href="{name}.html">{name}</a>' in body for name in ("rbm", "mnist")] == [True, True]
    assert body.count("<a ") == 2  # and none for the page's name in another column
    assert "rbm &amp; more" in body


def test_a_verdict_before_a_page_leads_to_its_evidence():
    table = pd.DataFrame({"Verdict": ["mixed (reduced)", "supported (full)"], "Page": ["rbm", "mnist"]})
    page = BeautifulSoup(to_html(table, "caption", pages="Page"), "html.parser")
    links = [(link["href"], link.get_text()) for link in page.select("a:has(.sd-badge)")]
    assert links == [("rbm.html#what-held", "mixed"), ("mnist.html#what-held", "supported")]
    assert "<a" not in to_html(table, "caption")


def test_long_texts_stand_under_their_rows():
    table = pd.DataFrame({"Claim": ["one", "two"], "Why": ["first & last", "second"], "Chapter": ["rbm", "mnist"]})
    page = BeautifulSoup(to_html(table, "caption", pages="Chapter", below=["Why"]), "html.parser")
    lines = [[cell.get_text() for cell in line.find_all(["th", "td"])] for line in page.find_all("tr")]
    assert lines[0] == ["Claim", "Chapter"]
    assert lines[1:] == [["one", "rbm"], ["Why. first & last"], ["two", "mnist"], ["Why. second"]]
    assert [line.td["colspan"] for line in page.find_all("tr")[2::2]] == ["2", "2"]


def ucsd_run(
    layer,
    low,
    high,
    *,
    apart=(True, True, True),
    beats=1,
    kind="complete",
    used=100,
    preset="liu2020_paper",
    **changes,
):
    """A run in which the layers are apart or not, by pairs, and the reconstruction error is beaten (1), met or not."""
    error = (0.7, 0.8)
    signs = dict(zip(combinations(("conv1", "conv2", "conv3"), 2), apart, strict=True))
    differences = {
        f"{preset}, {one} − {other}": (0.1, 0.2) if sign else (-0.1, 0.2) for (one, other), sign in signs.items()
    }
    differences["attention − reconstruction error"] = {1: (0.1, 0.2), 0: (-0.1, 0.2), -1: (-0.2, -0.1)}[beats]
    metrics = [
        row("pixel AUROC, difference", sum(ends) / 2, name, "test clips", low=ends[0], high=ends[1])
        for name, ends in differences.items()
    ]
    metrics += [
        row("pixel AUROC", (low + high) / 2, "attention", "test clips", low=low, high=high),
        row("pixel AUROC", sum(error) / 2, "reconstruction error", "test clips", low=error[0], high=error[1]),
        row("pixel AUROC", 0.5, "random", "test clips", low=0.49, high=0.51),
    ]
    run = make_run(metrics=metrics, kind=kind, used=used, recipe="report1", chapter="ucsd")
    del run.parameters["digit"]
    run.parameters.update({"layer": layer, "preset": preset} | changes)
    return run


def mvtec_run(
    category,
    auroc,
    iou,
    *,
    missed=(0.7, 100),
    others=(0.6, 0.65),
    kind="complete",
    used=100,
    **changes,
):
    """A run of one category: intervals of attention's AUROC and IoU, share of maps that miss, AUROC of a baseline."""
    intervals = [("pixel AUROC", "attention", auroc), ("pixel AUROC", "SSIM", others)]
    intervals += [("pixel AUROC", "reconstruction error", (0.5, 0.55)), ("best IoU (oracle)", "attention", iou)]
    metrics = [row(name, sum(ends) / 2, method, low=ends[0], high=ends[1]) for name, method, ends in intervals]
    metrics += [row("maps that miss the anomaly", missed[0], "attention", n=missed[1]), row("parameters", 72_803_363)]
    run = make_run(metrics=metrics, kind=kind, used=used, recipe="report2", chapter="mvtec")
    run.record["budget"]["unit"] = "images"
    del run.parameters["digit"]
    run.parameters.update({"category": category, "preset": "liu2020_code", "augmentation": "paper"} | changes)
    return run


def test_categories_without_a_run_say_how_to_get_one_and_others_which_recipe_they_follow():
    where = {"layer": "layer2.1.conv1"}
    runs = [mvtec_run("pill", (0.7, 0.8), (0.1, 0.2), **where)]
    runs.append(mvtec_run("pill", (0.6, 0.7), (0.1, 0.2), recipe="report1", **where))
    lines = beside(read(), runs)
    table = wide(lines[lines["table"] == "mvtec"]).set_index(["Setting", "Quantity"])["Ours"]
    assert table["pill", "pixel AUROC"].splitlines() == [
        "mvtec10: 0.650 (0.600–0.700)",  # set beside the report whose recipe it follows
        "mvtec15: recipe=report2: 0.750 (0.700–0.800)",
        "mvtec15: recipe=report1: 0.650 (0.600–0.700)",
    ]
    assert table["zipper", "IoU"] == (
        "no run of ours; python -m expvae_book.data fetch mvtec --categories zipper; "
        "papermill book/mvtec15.md out.ipynb -p categories zipper"
    )


def ucsd_job(aurocs, *, presets=("liu2020_paper", "liu2020_code"), further=(), **changes):
    """The job whose maps, of all layers by some presets, are those of `ucsd_run`."""
    job, maps = None, [*further]
    for preset in presets:
        for layer, ends in aurocs.items():
            run, name = ucsd_run(layer, *ends, preset=preset, **changes), f"{layer}, {preset}"
            named = [line | {"method": line["method"].replace("attention", name)} for line in run.record["metrics"]]
            seen = [] if job is None else job.record["metrics"]
            run.record["metrics"] = seen + [line for line in named if line not in seen]
            job, maps = run, [*maps, name]
    del job.parameters["layer"], job.parameters["preset"]
    job.record["maps"] = maps
    return job


UCSD_AUROCS = {"conv1": (0.8, 0.9), "conv2": (0.93, 0.95), "conv3": (0.905, 0.92)}


def test_a_job_stands_beside_as_its_maps_would():
    job = ucsd_job(UCSD_AUROCS)
    runs = [ucsd_run(layer, *ends, preset=preset) for preset in PRESETS[:2] for layer, ends in UCSD_AUROCS.items()]
    ours = [beside(read(), found).sort_values(["where", "setting", "ours"])["ours"].tolist() for found in ([job], runs)]
    assert ours[0] == ours[1]
    assert sum("preset=liu2020_paper: 0.940 (0.930–0.950)" in text for text in ours[0]) > 0


def test_of_a_job_only_maps_are_compared_of_which_something_is_printed():
    unprinted = ["conv4, liu2020_code", "conv1, most_deviant", "conv2, normal_difference"]
    job, plain = ucsd_job(UCSD_AUROCS, further=unprinted), make_run()
    shown = comparable([job, plain])
    assert [(run.parameters.get("layer"), run.parameters.get("preset")) for run in shown] == [
        *((layer, preset) for preset in PRESETS[:2] for layer in UCSD_AUROCS),
        (None, None),
    ]
    assert shown[-1] is plain
    job.record["maps"] = unprinted  # nothing of it is
    assert comparable([job]) == [job]
    pill = mvtec_run("pill", (0.7, 0.8), (0.1, 0.2))
    pill.record["maps"] = ["conv1, liu2020_code", "layer2.1.conv1, brongers2021", "layer3.1.conv2, liu2020_paper"]
    assert [run.parameters["layer"] for run in comparable([pill])] == ["layer2.1.conv1"]


def test_of_several_configurations_the_largest_budget_counts_and_not_the_best_result():
    row = next(row for row in read().to_dict("records") if row["metric"] == "less intuitive maps")
    whole = [make_run(seed=seed, metrics=[share(value, 0.1, 0.3)]) for seed, value in enumerate((0.2, 0.3))]
    short = make_run(metrics=[share(0.1, 0.05, 0.2)], used=20)
    old = make_run(metrics=[share(0.05, 0.01, 0.2)], outdated=True)
    assert matching.ours(row, [short, old, *whole]) == [(whole[0], (0.2, 0.1, 0.3)), (whole[1], (0.3, 0.1, 0.3))]
    assert matching.ours(row, [short, old]) == [(short, (0.1, 0.05, 0.2))]
    assert matching.ours(row, []) == []


def test_the_mark_of_the_data_stands_beside_our_number():
    run = make_run(kind="partial", metrics=[share(0.1, 0.05, 0.2)])
    run.record["data"]["note"] = "partial and re-encoded"
    table = beside(published_share(), [run])
    shown = table.loc[table["ours"] != "", "ours"]
    assert len(shown)
    assert all("partial, re-encoded data" in text for text in shown)


# dSprites


def sprite_run(
    gamma, weight, score, *, seed=0, beta=1, cost=40.0, overlap=0.5, kind="complete", used=100, **parameters
):
    """A model of the disentanglement chapter; asked for 100 steps."""
    variant = "variant" if weight else "none"
    given = {"beta": beta, "gamma": gamma, "lambda": weight, "seed": seed, "recipe": "report2", "steps": used}
    given |= {"attention": "liu2020" if weight else "none", "layer": variant, "alpha": variant, "pairs": variant}
    metrics = [
        row(sprite_judges.METRIC[0], score, *sprite_judges.METRIC[1:]),
        row(sprite_judges.OVERLAP[0], overlap, *sprite_judges.OVERLAP[1:]),
        row("reconstruction per image", cost),
    ]
    run = make_run(chapter="disentanglement", kind=kind, metrics=metrics)
    run.record["budget"] = {"unit": "steps", "asked": 100, "used": used}
    run.parameters.clear()
    run.parameters.update(given | parameters)
    return run


def test_interval_over_seeds_is_students():
    values = [0.1, 0.4, 0.2, 0.6]
    low, high = judging.seed_interval(values)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="two or more, got 1"):
        judging.seed_interval([0.5])


# Discrepancies

HARDLY, LARGE, WIDE = (-0.004, 0.009), (0.012, 0.02), (0.002, 0.02)


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [
        (HARDLY, "hardly any effect"),
        ((0.002, 0.01), "hardly any effect"),  # not zero, but small
        ((-0.01, -0.002), "hardly any effect"),
        (LARGE, "effect"),
        ((-0.02, -0.011), "effect"),
        (WIDE, "undecided"),
        ((-0.011, 0.0), "undecided"),
        ((-0.5, 0.5), "undecided"),
    ],
)
def test_hardly_any_effect_takes_an_interval_close_to_zero(interval, outcome):
    low, high = interval
    assert judges.effect(row("change", (low + high) / 2, low=low, high=high), 0.01) == outcome


def test_rendered_sprites_stand_beside_published_numbers_with_their_mark():
    run = sprite_run(40, 0, 0.75, kind="rendered", used=30)
    lines = beside(read(), [run])
    ours = lines[(lines["setting"] == "FactorVAE, γ 40") & (lines["metric"] == "disentanglement metric")]["ours"]
    assert ours.tolist() == ["0.750 · rendered data · 30 of 100 steps"]
