from pathlib import Path

import pandas as pd
from pybtex.database import parse_file

BOOK = Path(__file__).resolve().parents[1] / "book"
NUMBERS = ["image_auroc", "pixel_auroc", "aupro"]


def test_every_row_of_the_literature_has_a_source_and_a_fraction():
    table = pd.read_csv(BOOK / "literature" / "mvtec.csv", dtype={"note": str})
    assert list(table.columns) == ["method", "year", "kind", "key", *NUMBERS, "where", "note"]
    assert table["method"].is_unique
    assert set(table["key"]) <= set(parse_file(BOOK / "references.bib").entries)
    assert table[["method", "year", "kind", "key", "where"]].notna().all(axis=None)
    assert (table[NUMBERS].isna() | ((table[NUMBERS] > 0) & (table[NUMBERS] < 1))).all(axis=None)
    # The paper's mean is computed from its own table, so that no number stands in two places.
    assert set(table.loc[table[NUMBERS].isna().all(axis=1), "key"]) == {"liu2020"}


def test_every_slip_was_read_in_a_file_at_a_commit_or_is_an_inference():
    table = pd.read_csv(BOOK / "literature" / "slips.csv", dtype=str, keep_default_na=False)
    assert list(table.columns) == ["slip", "who", "key", "commit", "file", "read", "effect"]
    assert (table[["slip", "who", "key", "read", "effect"]] != "").all(axis=None)
    assert not table.duplicated(["slip", "who"]).any()
    assert set(table["key"]) <= set(parse_file(BOOK / "references.bib").entries)
    commits = {"expvae_code": "b9afcf5", "report2_code": "02ce389", "brongers2021": "caa8484", "report1": ""}
    assert (table["commit"] == table["key"].map(commits)).all()
    assert (table["file"].str.endswith(".py") == (table["commit"] != "")).all()
    # A report's numbers may be of another state than what was read.
    assert table["effect"].str.contains("would").all()
