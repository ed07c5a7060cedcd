"""Tables of the pages, as HTML."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from statistics import mean
from typing import Any

import pandas as pd
from IPython.display import Markdown

from expvae_book import claims, judging, runs
from expvae_book.data.catalogue import source
from expvae_book.matching import NO_RUN, budget_text
from expvae_book.publications import QUOTED_BY, SOURCES

COLOURS = {"supported": "success", "contradicted": "danger", "mixed": "warning", "undecided": "muted"}
HELD = "what-held"  # the section of a page that has the evidence of its verdicts
CELL = "text-align: left; vertical-align: top; white-space: normal; padding: 0.2rem 0.6rem"


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """One line per setting and metric, one column per source and one for ours; for reading, not for computing.

    Args:
        table: Lines of `beside`.
    """
    sources = {source: name for source, name in SOURCES.items() if (table["source"] == source).any()}
    lines = []
    for (setting, metric), group in table.groupby(["setting", "metric"], sort=False):
        # The reports quote the same number of the paper with other digits: 0.1 is 0.10.
        given = group.drop_duplicates(["source", "value", "low", "high"])
        theirs = {name: ", ".join(given["published"][given["source"] == source]) for source, name in sources.items()}
        ours = group[group["ours"] != NO_RUN]
        several = ours["chapter"].nunique() > 1  # the same quantity by the protocols of two chapters
        texts = ours["chapter"] + ": " + ours["ours"] if several else ours["ours"]
        lines.append({"Setting": setting, "Quantity": metric, **theirs, "Ours": "\n".join(texts.unique()) or NO_RUN})
    result = pd.DataFrame(lines)
    return result if result["Setting"].any() else result.drop(columns="Setting")


def listing(table: pd.DataFrame) -> pd.DataFrame:
    """Every line of `beside` with the place where the number was printed; for reading, not for computing."""
    return pd.DataFrame(
        {
            "Data set": table["dataset"],
            "Setting": table["setting"],
            "Quantity": table["metric"],
            "Source": table["source"].map(SOURCES),
            "Published": table["published"],
            "Ours": table["ours"],
            "Read in": table["quoted_by"].map(QUOTED_BY) + ", " + table["where"],
            "Note": table["note"],
        }
    )


def to_html(table: pd.DataFrame, caption: str, *, pages: str | None = None, below: Sequence[str] = ()) -> str:
    """A table as HTML that scrolls sideways on a narrow screen; a newline in a cell becomes a line break.

    Args:
        table: What is shown.
        caption: What it shows.
        pages: The column that names pages of the book, if there is one; its cells become links, and a verdict before
            one leads to the page's evidence.
        below: Columns of long texts; each stands under its row, across the whole table, after its name.
    """
    caption = html.escape(caption)
    texts, table = table[list(below)], table.drop(columns=list(below))
    if pages is not None:
        table = table.assign(**{pages: "page:" + table[pages]})
    with pd.option_context("display.max_colwidth", None):  # otherwise pandas cuts long texts
        body = table.to_html(index=False, na_rep="", border=0, justify="left", classes="published")
    body = re.sub(r"<td>page:(\w+)</td>", r'<td><a href="\1.html">\1</a></td>', body)
    verdict = rf"<td>({'|'.join(COLOURS)})(?=</td>| \((?:full|reduced|none)\b)"  # not each cell that begins like one
    body = re.sub(verdict, lambda cell: f"<td>{badge(cell[1])}", body)
    if pages is not None:
        body = re.sub(
            r'(<span[^<]*</span>)(?=[^<]*</td>\s*<td><a href="(\w+\.html)")', rf'<a href="\2#{HELD}">\1</a>', body
        )
    head, *rows = body.split("    </tr>\n")
    lines = [""] * len(rows)
    if below:
        wide = f'    <tr>\n      <td colspan="{len(table.columns)}">{{}}</td>\n    </tr>\n'
        named = texts.apply(lambda text: f"<em>{html.escape(text.name)}.</em> " + text.map(html.escape))
        lines[1:] = [wide.format("<br>".join(row)) for row in named.to_numpy()]
    body = head + "".join(f"    </tr>\n{line}{rest}" for line, rest in zip(lines, rows, strict=True))
    body = body.replace("\\n", "<br>").replace("<th>", f'<th scope="col" style="{CELL}">')
    body = re.sub(
        r"\[[^][<]*\]", r'<span style="white-space: nowrap">\g<0></span>', body.replace("<td", f'<td style="{CELL}"')
    )
    width = (5 if below else 7) * len(table.columns)  # long texts are read across a narrow screen, not scrolled
    body = body.replace("<table", f'<table style="min-width: {width}rem"', 1)
    region = f'<div style="overflow-x: auto" role="region" tabindex="0" aria-label="{caption}">\n{body}\n</div>'
    return f"<p><em>{caption}</em></p>\n{region}"  # above what scrolls, so that all of it can be read


def show(table: pd.DataFrame, caption: str, **layout: Any) -> None:
    """Show a table on the page, laid out as `to_html` takes it."""
    from IPython.display import HTML, display

    display(HTML(to_html(table, caption, **layout)))


def titled(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Some columns of a table, such as that of the verdicts, with their names as they are printed."""
    return table[list(columns)].rename(columns=lambda name: name.replace("_", " ").capitalize())


def ends(row: Mapping[str, Any]) -> dict[str, float]:
    """A number and the ends of its interval, out of a row, as a figure takes them."""
    return {name: row[name] for name in ("value", "low", "high")}


NOT_YET = Markdown("*This run is not stored yet: the cells below compute it, and the next build of the book shows it.*")


def extent(run: runs.Run) -> str:
    """What data a run saw, how much of its budget it used, and whether today's code gives it."""
    card, budget = run.card, run.record["budget"]
    kind = f"{source(card.name).title}, {card.mark or 'complete'}"
    used = f"{budget['used']:,} of {budget['asked']:,} {budget['unit']}"
    return f"Data: {kind}; budget: {used}, one training (seed {run.parameters['seed']})."


def caption(run: runs.Run) -> Markdown:
    """What a figure or a table says of the run that made it, as a line of its own."""
    return Markdown(f"*{run.caption}*")


def badge(direction: str) -> str:
    """A verdict as HTML."""
    return f'<span class="sd-badge sd-bg-{COLOURS[direction]} sd-bg-text-{COLOURS[direction]}">{direction}</span>'


def made(found: Sequence[runs.Run]) -> str:
    """By which commits some runs were made, on which devices and, where that is stored, in which precisions."""
    resolved = [run.record.get("resolved", {}) for run in found]
    parts = [
        [runs.commit_text(run.record["git"]) for run in found],
        [run.record["device"].partition(":")[0] for run in found],
        [of["precision"] for of in resolved if "precision" in of],
    ]
    return "; ".join(" and ".join(dict.fromkeys(part)) for part in parts if part)


def badges(*chapters: str) -> Markdown:
    """The verdicts on the claims that chapters test, in a line each, with links to their evidence by `what_held`."""
    lines = ["What the stored runs say of each published claim; a verdict leads to its evidence:", ""]
    for one in chain.from_iterable(claims.verdicts(runs.find(), chapter=name).itertuples() for name in chapters):
        said = {"full": "at full strength", "none": "no run of ours can say"}.get(one.strength, one.strength)
        lines.append(f"- {one.claim} [{badge(one.direction)}]({one.chapter}.md#{HELD}) ({said})")
    return Markdown("\n".join(lines))


def grouped(orders: Mapping[str, str]) -> str:
    """What is above, below or not told apart from what, as "below the a and the b; above the c".

    Args:
        orders: By the name of what is compared with: how `runs.order` says it.
    """
    found: dict[str, list[str]] = {}
    for other, order in orders.items():
        found.setdefault(order, []).append(other)
    named = {order: [", the ".join(others[:-1]), others[-1]] for order, others in found.items()}
    return "; ".join(f"{order} the {' and the '.join(filter(None, names))}" for order, names in named.items())


def what_held(chapter: str) -> None:
    """Show the verdicts on the claims that a chapter tests, each with its evidence and criterion beneath."""
    verdicts = claims.verdicts(runs.find(), chapter=chapter)
    table = titled(verdicts, "claim", "claimed_by", "verdict", "evidence", "criterion", "would_decide")
    caption = f"Verdicts, by code, from the stored runs on real data. {claims.RULES}"
    show(table, caption, below=["Evidence", "Criterion", "Would decide"])


Cell = tuple[str, ...] | Callable[[runs.Run], Any]  # what run.text takes of a number, or what makes the cell


def cells(run: runs.Run, columns: Mapping[str, Cell]) -> dict[str, Any]:
    """A line on a run; the cell of a number that it does not have is blank."""
    return {name: cell(run) if callable(cell) else run.text(*cell, lacking="") for name, cell in columns.items()}


def spread(found: Sequence[runs.Run], metric: str, method: str = "", subset: str = "", form: str = ".3f") -> str:
    """A number with its interval where one run has it; where several do, their mean, least and greatest."""
    having = [run for run in found if run.text(metric, method, subset, lacking="")]
    if len(having) == 1:
        return having[0].text(metric, method, subset, form)
    values = [run.metric(metric, method, subset)["value"] for run in having]
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else ""


def stored_runs(chapter: str, told_by: Sequence[str], columns: Mapping[str, Cell]) -> pd.DataFrame:
    """Every stored run of a chapter, those that differ in the seed alone in one line.

    That is what tells them apart, their data, budgets and numbers (see `spread`), and their states.

    Args:
        chapter: Name of the chapter.
        told_by: Parameters of a run, or facts of its training.
        columns: The numbers.
    """
    lines = []
    for same in judging.alike(runs.find(chapter), "seed"):
        facts = [run.parameters | run.record.get("training", {}) for run in same]
        line: dict[str, Any] = {name: ", ".join(dict.fromkeys(str(of[name]) for of in facts)) for name in told_by}
        line |= {"data": listed(same, lambda run: run.card.mark or "complete"), "budget": listed(same, budget_text)}
        for name, cell in columns.items():
            line[name] = listed(same, cell) if callable(cell) else spread(same, *cell)
        lines.append(line | {"state": listed(same, word), "made by": made(same)})
    return pd.DataFrame(lines)


def listed(found: Sequence[runs.Run], what: Callable[[runs.Run], Any]) -> str:
    """What is said of each run, each thing once."""
    return ", ".join(dict.fromkeys(str(what(run)) for run in found))


def word(run: runs.Run) -> str:
    """The state of a run in a word."""
    return run.state.partition(" ")[0]
