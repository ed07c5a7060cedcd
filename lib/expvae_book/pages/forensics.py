"""What the chapter on slips of published code tabulates, draws and says: why do the reproductions disagree?"""

import pandas as pd
from IPython.display import Markdown, display

from expvae_book import names, power, report, runs, tables
from expvae_book.pages import seeds
from expvae_book.pages.sanity import RULES, SHOWN, followed
from expvae_book.places import REPOSITORY
from expvae_book.runs import Run

SLIPS = REPOSITORY / "book" / "literature" / "slips.csv"
DATA = {"ucsd": "UCSD Ped1", "mvtec": "MVTec AD"}  # where the epoch of Report 2's code is chosen on the test masks


def slips() -> pd.DataFrame:
    """What was read in published code: slip, who, key of the source, commit, file, what was read, and its effect."""
    return pd.read_csv(SLIPS, keep_default_na=False)


def in_short() -> None:
    """Show what was found in a few sentences, and the slips with their places."""
    found = slips()
    lines = [
        f"**In short.** {(found['commit'] != '').sum()} slips or choices were read in published code, and "
        f"{(found['commit'] == '').sum()} are inferred from printed numbers. Three of the things that they can do:"
    ]
    if (run := switched()) is not None:
        asked, stored = ([_switch(run, hook, layer) for layer in names.CONVOLUTIONS] for hook in HOOKS)
        lines.append(
            f"- *Three layers, one number.* One model of ours has the pixel AUROCs {_listed(asked)} at its three "
            f"layers, and with the slip inferred for Report 1 {_listed(stored)}. {report.extent(run)}"
        )
    if len(gains := chosen()):
        best = gains.loc[gains["gain"].idxmax()]
        lines.append(
            f"- *An epoch chosen on the test masks.* Where it does most ({best['Map']}), the last of {best['stages']} "
            f"stages has a pixel AUROC of {best['last']:.3f}, the best of them {best['best']:.3f}. "
            f"{report.extent(best['run'])}"
        )
    spread, least = next(iter(seeds.spreads().values())), min(seeds.paper_differences().values())
    lines.append(
        f"- *Noise.* Report 2's runs of AD-FactorVAE, which by their code differ by chance alone, have a standard "
        f"deviation of {spread.sd:.3f} in the FactorVAE metric. The paper's least difference, {least:.3f} as read off "
        f"its figure (±{seeds.reading_error():.3f}), would take {power.seeds_needed(least, spread.sd)} seeds an arm "
        f"for a power of {power.TARGET:.0%}."
    )
    display(Markdown(lines[0] + "\n\n" + "\n".join(lines[1:])))
    table = pd.DataFrame({"Slip": found["slip"], "Who": found["who"], "Read in": places(found)})
    report.show(
        table.assign(Effect=found["effect"]), "Slips, where they were read, and what each would do.", below=["Effect"]
    )


def places(found: pd.DataFrame) -> pd.Series:
    """File and commit of each slip, or that it is inferred."""
    return (found["file"] + " at " + found["commit"]).where(found["commit"] != "", "inference")


def readings() -> None:
    """Show what was read of each slip."""
    found = slips()
    table = pd.DataFrame({"Slip": found["slip"], "Who": found["who"], "What was read": found["read"]})
    report.show(table, "What was read in the files of the table above, or what an inference rests on.")


HOOKS = ("hook, as asked", "hook, first stored")


def switched() -> Run | None:
    """The newest run on UCSD Ped1 whose maps were made with each switch of the published code."""
    found = runs.find("ucsd", recipe="report1", seed=0)
    real = [run for run in found if run.card.kind != "sample"] or found
    return real[-1] if real else None


def _switch(run: Run, switch: str, setting: str) -> float:
    return run.metric("switch", switch, setting)["value"]


def _listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:.4f}" for number in numbers)


def switches() -> None:
    """Show what each switch alone does to the pixel AUROC on UCSD Ped1."""
    if (run := switched()) is None:
        display(Markdown("*No run of ours says it yet.*"))
        return
    changes = run.rows("switch, change").set_index(["method", "subset"])
    lines = []
    for row in run.rows("switch").itertuples():
        case, change, reference = (row.method, row.subset), "", ""
        if case in changes.index:
            found = changes.loc[case]
            change = f"{found['value']:+.4f}"
            if not pd.isna(found["low"]):
                change += f" [{found['low']:+.4f}, {found['high']:+.4f}]"
            reference = " ".join(names.AGAINST.get(case, names.CORRECTED_CASE)).strip()
        lines.append(
            {
                "Switch": row.method,
                "Set to": row.subset,
                "pixel AUROC": f"{row.value:.4f} [{row.low:.3f}, {row.high:.3f}]",
                "Clips": f"{row.n:.0f}",
                "Change": change,
                "Against": reference,
            }
        )
    report.show(
        pd.DataFrame(lines),
        f"The pixel AUROC of the map {names.SWITCHED_LAYER}, liu2020_code, with each switch alone: every tenth frame "
        "of all test clips, 95 % intervals over clips. A change is paired, and has an interval, where the truth is the "
        "same. “Corrected”: all settings as this book has them, and the masks of all clips that have some; the "
        "release's only are those of its ten that are at hand. “First stored”: the look-up of the first tensor. "
        f"{run.caption}",
    )


def chosen() -> pd.DataFrame:
    """By training and map the pixel AUROC of the last stage and of the best one, and how many stages there were.

    The untrained network is no stage here, which no checkpoint is taken of.
    """
    lines = []
    for run in followed():
        for rule, preset in RULES.items():
            layer = SHOWN[run.chapter][0]
            trained = tables.stages(run, f"{layer}, {preset}")
            if run.chapter in DATA and trained is not None and len(trained):
                last, best = float(trained[-1]), float(trained.max())
                line = {"Data": DATA[run.chapter], "run": run, "Map": f"{layer}, {rule}", "stages": len(trained)}
                lines.append(line | {"last": last, "best": best, "gain": best - last})
    return pd.DataFrame(lines)


def choices() -> None:
    """Show what the best stage by the test masks makes of a pixel AUROC, mean over the trainings of a data set."""
    gains = chosen()
    if gains.empty:
        display(Markdown("*No run of ours says it yet.*"))
        return
    lines = [
        {
            "Map": f"{data}, {name}",
            "Trainings": len(of),
            "Stages": " to ".join(dict.fromkeys(map(str, (of["stages"].min(), of["stages"].max())))),
            "Last stage": f"{of['last'].mean():.3f}",
            "Best, by the test masks": f"{of['best'].mean():.3f}",
            "Greatest gain": f"{of['gain'].max():.3f}",
        }
        for (data, name), of in gains.groupby(["Data", "Map"], sort=False)
    ]
    report.show(
        pd.DataFrame(lines),
        "Pixel AUROC of trainings at their last stage, and at the best of all measured after the first step: means "
        "over trainings.",
    )
