"""Tables of the chapter on disentanglement: what its runs say, beside each other and beside the published numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from expvae_book import judges, names, publications
from expvae_book.names import COLLAPSED, METRIC, OVERLAP, PAIRS, PUBLISHED, REFERENCE, SPATIAL
from expvae_book.runs import Run, order

RULES = list(COLLAPSED)
COST = "reconstruction per image"
CHOICES = ("attention", "layer", "alpha", "pairs")

Line = tuple[list[int] | list[float], list[float]]  # where along x, and the values there


def title(run: Run, seeds: bool = True) -> str:
    """A model in words, with its seed where seeds matter."""
    name = names.title(run.parameters)
    return f"{name}, seed {run.parameters['seed']}" if seeds else name


def results(found: Sequence[Run]) -> pd.DataFrame:
    """What each model reaches: the metrics of disentanglement and the losses."""
    return pd.DataFrame(
        {
            "Model": title(run),
            f"{METRIC} ({REFERENCE})": run.text(METRIC, REFERENCE, RULES[0]),
            f"{METRIC} ({PUBLISHED})": run.text(METRIC, PUBLISHED, RULES[1]),
            "MIG": run.text("MIG"),
            "DCI disentanglement": run.text("DCI disentanglement"),
            "completeness": run.text("DCI completeness"),
            "informativeness": run.text("DCI informativeness"),
            "Reconstruction, held out (nats)": run.text(COST, form=".2f"),
            "KL (nats)": run.text("KL per image", form=".2f"),
            "Total correlation (nats)": run.text("total correlation", form=".2f"),
            "Active latents": run.text("active units", form=".0f"),
        }
        for run in found
    )


def differences(found: Sequence[Run]) -> pd.DataFrame:
    """What the attention loss changes: AD-FactorVAE minus FactorVAE of the same γ and seed, and over seeds.

    An interval over seeds is Student's, and needs two; a line of one seed has none.
    """
    quantities = {
        METRIC: (METRIC, REFERENCE, RULES[0]),
        "Reconstruction (nats)": (COST, "", ""),
        "Total correlation (nats)": ("total correlation", "", ""),
        f"AD ratio at conv4, {PAIRS[0]}": (OVERLAP, "conv4", PAIRS[0]),
        f"AD ratio at conv4, {PAIRS[1]}": (OVERLAP, "conv4", PAIRS[1]),
    }
    plain = {(run.parameters["gamma"], run.parameters["seed"]): run for run in found if not run.parameters["lambda"]}
    pairs: dict[tuple[Any, Any], list[tuple[Run, Run]]] = {}
    for run in found:
        gamma, weight, seed = (run.parameters[name] for name in ("gamma", "lambda", "seed"))
        if weight and (gamma, seed) in plain:
            pairs.setdefault((gamma, weight), []).append((run, plain[gamma, seed]))
    lines = []
    for (gamma, weight), both in pairs.items():
        line = {"γ": gamma, "λ": weight, "Seeds": len(both)}
        for name, wanted in quantities.items():
            values = [
                one.metric(*wanted)["value"] - other.metric(*wanted)["value"]
                for one, other in both
                if one.text(*wanted, lacking="") and other.text(*wanted, lacking="")
            ]
            line[name] = _mean(values)
        lines.append(line)
    return pd.DataFrame(lines)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.3f}"
    low, high = judges.seed_interval(values)
    return f"{np.mean(values):+.3f} [{low:+.3f}, {high:+.3f}]"


def seed_spread() -> float:
    """How far the seeds of one FactorVAE of Brongers et al. lie apart in their metric."""
    table = publications.read()
    table = table[(table["source"] == "brongers") & (table["metric"] == "disentanglement metric")]
    values = table[table["setting"].str.startswith("FactorVAE")]["value"]
    return float(values.max() - values.min())


def points(found: Sequence[Run]) -> pd.DataFrame:
    """The points of the trade-off figure: ours, the ones read off the paper's figure, and those of Brongers et al.

    Columns: source, kind, label, score, low, high and cost. Costs of Brongers et al. are means over their three seeds.
    """
    lines = [
        {
            "source": "ours",
            "kind": names.title(run.parameters).partition(",")[0],
            "label": _weights(run.parameters),
            "score": run.metric(METRIC, REFERENCE, RULES[0])["value"],
            "low": run.metric(METRIC, REFERENCE, RULES[0])["low"],
            "high": run.metric(METRIC, REFERENCE, RULES[0])["high"],
            "cost": run.metric(COST)["value"],
        }
        for run in found
    ]
    table = publications.read()
    table = table[table["table"] == "dsprites"]
    costs = table[table["metric"] == "reconstruction loss"].set_index("setting")["value"]
    for row in table[table["metric"] == "disentanglement metric"].itertuples():
        model = row.setting.partition(", seed")[0]
        cost = costs.get(row.setting, costs.get(f"{model}, mean of the seeds"))
        kind, _, rest = model.partition(", ")
        lines.append(
            {
                "source": publications.SOURCES[row.source],
                "kind": kind,
                "label": rest.split(" ")[1] if row.source == "paper" else "",
                "score": row.value,
                "low": row.low,
                "high": row.high,
                "cost": cost,
            }
        )
    return pd.DataFrame(lines)


def _weights(parameters: Mapping[str, Any]) -> str:
    return str(parameters["gamma"] or parameters["beta"])


def curves(found: Sequence[Run]) -> dict[str, dict[str, Line]]:
    """The curves of training: panel -> model -> steps and values."""
    panels: dict[str, dict[str, Line]] = {}
    logged = {
        "reconstruction": "reconstruction (nats)",
        "kl": "KL (nats)",
        "total_correlation": "TC, discriminator's estimate (nats)",
        "attention": "L_AD",
    }
    measured = {METRIC: f"{METRIC}, coarse lattice", "total correlation": "TC by samples, coarse lattice (nats)"}
    for run in found:
        for name, panel in logged.items():
            if run.record["losses"].get(name):
                panels.setdefault(panel, {})[title(run)] = (run.record["losses"]["step"], run.record["losses"][name])
        scheduled = run.record["scheduled"]
        for name, panel in measured.items():
            if scheduled:
                steps = sorted(map(int, scheduled))
                panels.setdefault(panel, {})[title(run)] = (steps, [scheduled[str(step)][name] for step in steps])
    return panels


def overlaps(found: Sequence[Run], metric: str = OVERLAP) -> pd.DataFrame:
    """How much the maps of every model overlap at every layer, by which pairs; 95 % intervals over images.

    Args:
        found: The models.
        metric: OVERLAP, the AD ratio of the maps as they are, or EQUALISED, that of maps of equal sum.
    """
    return pd.DataFrame(
        {"Model": title(run), "Pairs": pairs}
        | {layer: run.text(metric, layer, pairs, lacking="none") for layer in SPATIAL}
        for pairs in PAIRS
        for run in found
    )


def compared(found: Sequence[Run], layers: Sequence[str], metric: str, pairs: str) -> tuple[int, int, int]:
    """Overlaps of maps with the attention loss against those without, at the same γ and seed.

    Args:
        found: The models.
        layers: Where the maps are taken.
        metric: OVERLAP or EQUALISED.
        pairs: One of PAIRS; models without such a pair are left out.

    Returns:
        In how many cases, a model at a layer, the interval over images lies below, above, and how many there are.
    """
    plain = {(run.parameters["gamma"], run.parameters["seed"]): run for run in found if not run.parameters["lambda"]}
    told = []
    for run in found:
        other = plain.get((run.parameters["gamma"], run.parameters["seed"]))
        if run.parameters["lambda"] and other is not None:
            for layer in layers:
                if all(model.text(metric, layer, pairs, lacking="") for model in (run, other)):
                    told.append(order(run.metric(metric, layer, pairs), other.metric(metric, layer, pairs)))
    return told.count("below"), told.count("above"), len(told)


def ceilings(run: Run) -> pd.DataFrame:
    """What a perfect code scores by each protocol, with spare latents beside it: mean and range of draws."""
    rows = run.rows("perfect code")
    lines = []
    for subset in dict.fromkeys(rows["subset"]):
        line = {"Perfect code with": subset}
        for name in (REFERENCE, PUBLISHED):
            row = run.metric("perfect code", name, subset)
            line[name] = f"{row['value']:.3f} ({row['low']:.3f}–{row['high']:.3f})"
        lines.append(line)
    return pd.DataFrame(lines)


def protocols(found: Sequence[Run]) -> pd.DataFrame:
    """The same encodings by every protocol and rule for collapsed latents."""
    lines = []
    for run in found:
        line = {"Model": title(run)}
        for protocol, rule in ((REFERENCE, RULES[0]), (PUBLISHED, RULES[1]), (PUBLISHED, RULES[2])):
            line[f"{protocol}; {rule}"] = run.text(METRIC, protocol, rule)
            line[f"latents that count; {protocol}; {rule}"] = run.text("latents that count", protocol, rule, form=".0f")
        lines.append(line)
    return pd.DataFrame(lines)


def gradients(run: Run) -> pd.DataFrame:
    """How strongly each variant of the loss pulls at a model's encoder at λ = 1, beside the rest of its loss."""
    rest = run.metric(names.GRADIENT, "rest of the loss")["value"]
    lines = []
    for name in run.rows("L_AD")["method"]:
        norm = run.metric(names.GRADIENT, name)["value"]
        lines.append(
            {
                "Variant": name,
                "L_AD": f"{run.metric('L_AD', name)['value']:.4f}",
                "Norm of its gradient": f"{norm:.2e}",
                "as a share of the rest": f"{norm / rest:.1e}",
                "Parameters it reaches": f"{run.metric(names.REACHED, name)['value']:,}",
            }
        )
    return pd.DataFrame(lines)


def every_run(stored: Sequence[Run]) -> pd.DataFrame:
    """Every stored model: what it was trained with, and what it reached."""
    lines = []
    for run in stored:
        parameters = run.parameters
        lines.append(
            {
                "Model": title(run),
                **{name: parameters[name] for name in CHOICES},
                "Recipe": parameters["recipe"],
                "Steps": f"{run.record['budget']['used']:,} of {run.record['budget']['asked']:,}",
                "Data": run.card.mark or "complete",
                METRIC: run.text(METRIC, REFERENCE, RULES[0]),
                "Reconstruction (nats)": run.text(COST, form=".2f"),
                "Total correlation (nats)": run.text("total correlation", form=".2f"),
                f"AD ratio at conv4, {PAIRS[0]}": run.text(OVERLAP, "conv4", PAIRS[0], lacking=""),
                "State": run.state,
            }
        )
    return pd.DataFrame(lines)
