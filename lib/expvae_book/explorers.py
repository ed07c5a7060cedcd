"""Explorers: figures of a page that its reader can vary, made of what a record holds.

Without a script such a figure is a picture with its alternative text. Beside the picture stand, as JSON, the numbers
of which ``book/_static/explorer.js`` makes controls, a drawing and a line that says what is shown; nothing else is
asked for. A data set's own images are never among them.
"""

import html
import json
from base64 import b64encode
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
import PIL.Image
from IPython.display import HTML, Image, Markdown

from expvae_book import figures, names, report
from expvae_book.runs import Run

NOTHING = Markdown("*There is nothing to explore here: the stored run keeps none of the maps that would be shown.*")
NETWORKS = ("trained", "untrained")


def embedded(map_NHW: np.ndarray, peak: float = 1.0) -> dict[str, Any]:
    """Maps as the script reads them: each in bytes, as shares of its own greatest value.

    M is kept as b = round(255 M / max M), so that b / 255 · max M is within max M / 510 of it.

    Args:
        map_NHW: Maps without a sign, as `expvae_book.measures.halved` gives them.
        peak: Their unit.
    """
    share_NHW = map_NHW.astype(np.float64)
    top_N = share_NHW.max((1, 2))
    byte_NHW = np.rint(255 * share_NHW / np.where(top_N, top_N, 1)[:, None, None]).astype(np.uint8)
    peaks = [float(f"{peak * top:.5g}") for top in top_N]
    return {"shape": list(map_NHW.shape[1:]), "peaks": peaks, "bytes": b64encode(byte_NHW.tobytes()).decode()}


def ious(run: Run) -> dict[str, np.ndarray]:
    """The IoU at every threshold of the record, by the counts of flagged pixels that it holds.

    With TP true and FP false flagged pixels, P anomalous and N normal ones, the anomalous class has TP / (P + FP), the
    normal one (N - FP) / (N + P - TP), and both have the mean of the two; 0 / 0 is 1, for nothing was to be found.

    Returns:
        By "anomalous class" and "both classes" [5, 100], and "flagged", the share of all pixels: of each defect shown,
        and last of all test images.
    """
    tp_MT, fp_MT, p_M, n_M = (
        run.arrays[f"flagged/{name}"].astype(float) for name in ("true", "false", "anomalous", "normal")
    )
    p_M1, n_M1 = p_M[:, None], n_M[:, None]
    with np.errstate(invalid="ignore"):
        both = tp_MT / (p_M1 + fp_MT), (n_M1 - fp_MT) / (n_M1 + p_M1 - tp_MT)
    anomalous_MT, normal_MT = (np.nan_to_num(of_MT, nan=1.0) for of_MT in both)
    flagged_MT = (tp_MT + fp_MT) / (p_M1 + n_M1)
    return {"anomalous class": anomalous_MT, "both classes": (anomalous_MT + normal_MT) / 2, "flagged": flagged_MT}


def digits(run: Run | None) -> HTML | Markdown:
    """Maps of a test image of each digit: by every rule and of each latent, trained and untrained, on two scales."""
    if run is None:
        return report.NOT_YET
    if any(f"{state}/each latent" not in run.arrays for state in NETWORKS):
        return NOTHING
    layer, kl_I = names.SHOWN["mnist"][0], run.arrays["kl_per_latent"]
    rules = [rule for rule in names.PRESETS if f"trained/{layer}, {rule}" in run.arrays]
    latents = np.argsort(-kl_I)
    maps: dict[str, list[dict[str, Any]]] = {}
    for state in NETWORKS:
        of_rules = [_stored(run, f"{state}/{layer}, {rule}") for rule in rules]
        each_BIHW, peak = _stored(run, f"{state}/each latent")
        maps[state] = [embedded(*of) | {"top": float(of[1])} for of in of_rules]
        maps[state] += [embedded(each_BIHW[:, i], peak) | {"top": peak} for i in latents]
    options = [f"over all latents, {names.RULES[rule]}" for rule in rules]
    options += [f"latent {i} alone ({kl_I[i]:.1f} nats), paper's rule" for i in latents]
    controls = [
        {"label": "Test digit", "options": [str(number) for number in range(10)], "start": 7},
        {"label": "Map", "options": options},
        {"label": "Network", "options": list(NETWORKS)},
        {"label": "Colour scale", "options": ["shared by all digits", "of each image, from its least value"]},
    ]
    shown = {f"mean,\n{state}": _stored(run, f"{state}/{layer}, {rules[0]}")[0] for state in NETWORKS}
    each_BIHW = _stored(run, "trained/each latent")[0]
    shown |= {f"latent {i},\ntrained": each_BIHW[:, i] for i in latents[:2]}
    picture = figures.examples(
        {}, shown, titles=[str(number) for number in range(10)], credit="Maps of the digits above"
    )
    alt = (
        "Maps of ten test digits by the paper's rule: the mean over the latents, trained and never trained, and the "
        "two latents that carry most."
    )
    return _figure({"kind": "maps", "controls": controls, "maps": maps}, {alt: picture})


def thresholds(run: Run) -> HTML | Markdown:
    """The map of each defect shown under a threshold, and the IoU of the anomalous class and of both at it."""
    name = f"trained/{names.SHOWN['mvtec'][0]}, liu2020_code"
    if "thresholds" not in run.arrays or name not in run.arrays:
        return NOTHING
    threshold_T, found = run.arrays["thresholds"], ious(run)
    classes = ("anomalous class", "both classes")
    whose = [f"defect {number + 1}" for number in range(len(run.arrays[name]))] + ["all test images"]
    best = int(found[classes[0]][-1].argmax())
    first = int(found[classes[0]][:-1, best].argmax())
    controls = [
        {"label": "Image", "options": whose[:-1], "start": first},
        {"label": "Threshold", "values": [f"{value:.3g}" for value in threshold_T], "start": best},
    ]
    spec = {"kind": "threshold", "controls": controls, "maps": embedded(*_stored(run, name))}
    spec |= {"ious": {of: found[of].round(4).tolist() for of in classes}}
    spec |= {"flagged": found["flagged"].round(5).tolist()}
    curves = {whose[m]: {of: (threshold_T.tolist(), found[of][m].tolist()) for of in classes} for m in (first, -1)}
    lines = figures.show(figures.curves(curves, x="threshold"))
    panel = figures.kept(run, "defects")
    pictures = {"Four defects with mask, reconstruction, attention map and thresholded map.": panel}
    pictures |= {"The two IoUs over the threshold, of one defect and of all test images.": lines}
    return _figure(spec, {alt: picture for alt, picture in pictures.items() if isinstance(picture, Image)})


def traversals(found: Mapping[str, Run], pictures: Mapping[str, Image]) -> HTML:
    """What a latent draws as it moves, of models side by side, by the order of their latents' KL.

    Beside it stands the latent's map of what is drawn, of models whose run keeps it.

    Args:
        found: Runs by the titles of their models.
        pictures: By alternative text, what is shown without a script.
    """
    values = [f"{value:+}" for value in names.TRAVERSAL]
    sheets = []
    for title, run in found.items():
        order_I, kl_I = np.argsort(-run.arrays["kl"]), run.arrays["kl"]
        sheet_YX = np.concatenate([np.concatenate(row_TYX, 1) for row_TYX in run.arrays["traversals"][order_I]])
        labels = [f"latent {i} ({kl_I[i]:.1f} nats)" for i in order_I]
        sheet = {"title": title, "labels": labels, "source": f"data:image/png;base64,{_png(sheet_YX)}"}
        if "traversal maps" in run.arrays:
            map_ITHW, peak = _stored(run, "traversal maps")
            sheet["maps"] = embedded(np.concatenate(map_ITHW[order_I]), peak)
        sheets.append(sheet)
    controls = [
        {"label": "Latent, by its KL", "options": [f"number {n + 1}" for n in range(len(sheets[0]["labels"]))]},
        {"label": "Value of the latent", "values": values, "start": len(values) // 2},
    ]
    if any("maps" in sheet for sheet in sheets):
        scales = ["shared by the maps of a model", "of each map, from its least value"]
        controls.append({"label": "Colour scale", "options": scales, "start": 1})
    return _figure({"kind": "traversal", "controls": controls, "sheets": sheets}, pictures)


def _stored(run: Run, name: str) -> tuple[np.ndarray, float]:
    """Maps of a record as shares of their greatest value, and that value."""
    return run.arrays[name], float(run.arrays[f"{name}, peak"])


def _png(image_YX: np.ndarray) -> str:
    buffer = BytesIO()
    PIL.Image.fromarray(image_YX).save(buffer, "PNG", optimize=True)
    return b64encode(buffer.getvalue()).decode()


def _figure(spec: Mapping[str, Any], pictures: Mapping[str, Image]) -> HTML:
    """Pictures, and what the script needs to let a reader vary them."""
    lookup = (255 * mpl.colormaps[figures.MAPS](np.arange(256))[:, :3]).round().astype(np.uint8)
    data = json.dumps({**spec, "colours": b64encode(lookup.tobytes()).decode()}, ensure_ascii=False)
    images = "\n".join(
        f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{b64encode(picture.data).decode()}">'
        for alt, picture in pictures.items()
    )
    script = data.replace("<", "\\u003c")  # nothing in it may end the element
    return HTML(f'<figure class="explorer">\n{images}\n<script type="application/json">{script}</script>\n</figure>')
