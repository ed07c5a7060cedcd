"""The claims of the paper and the reports, with criteria stated beforehand, and the verdict on each."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pandas as pd

from expvae_book import judges, sprite_judges
from expvae_book.judging import Judge, Verdict
from expvae_book.matching import each_map
from expvae_book.names import TEN
from expvae_book.publications import read
from expvae_book.runs import STORES, Run


@dataclass(frozen=True)
class Claim:
    """A claim of the paper or of a report, and how this book decides on it.

    Attributes:
        id: Short name.
        text: What is claimed.
        claimed_by: Who claims it.
        chapter: Chapter whose runs test it.
        criterion: What must be found for each verdict, fixed before the runs unless it says otherwise.
        judge: From the stored runs of the chapter on real data (one at least) and the published numbers to a verdict;
            None where nothing judges the claim yet.
    """

    id: str
    text: str
    claimed_by: str
    chapter: str
    criterion: str
    judge: Judge | None = None


def decide(claim: Claim, runs: Iterable[Run], reported: pd.DataFrame) -> Verdict:
    """The verdict on a claim; "not yet tested" where no run on real data or no judge exists."""
    store = STORES.get(claim.chapter, claim.chapter)
    real = [run for run in runs if run.chapter == store and run.card.kind != "sample"]
    if claim.chapter == "mvtec10":
        real = [run for run in real if run.parameters["category"] in TEN]
    if not real:
        return Verdict("not yet tested", f"No run of the chapter {claim.chapter} on real data is stored.")
    if claim.judge is None:
        return Verdict("not yet tested", f"The stored runs of the chapter {claim.chapter} do not measure this.")
    return claim.judge(real, reported)


def verdicts(runs: Iterable[Run], reported: pd.DataFrame | None = None) -> pd.DataFrame:
    """The verdict on every claim: columns id, claim, claimed_by, chapter, criterion, verdict, evidence and runs."""
    runs = each_map(runs)
    reported = read() if reported is None else reported
    table = pd.DataFrame(asdict(claim) | asdict(decide(claim, runs, reported)) for claim in CLAIMS)
    table["runs"] = table["runs"].map(", ".join)
    return table.rename(columns={"text": "claim"}).drop(columns="judge")


_MNIST_RUNS = (
    "Counted are all stored runs on complete MNIST, for ones and for threes, that follow the recipe of the authors' "
    "code or of a report to its last epoch. "
)
_ATTENTION_CRITERION = (
    _MNIST_RUNS + "Held: in every run the {} pixel AUROC over all outliers has an interval above one half and above "
    "the intervals of the random map and of every baseline (input intensity, reconstruction error, mean image "
    "difference, centre prior). Partly held: in every run it lies above one half and above the random map, which a map "
    "that ignores the image can do as well. Did not hold: otherwise."
)
_MVTEC_RUNS = (
    " Counted are runs on complete categories that follow the recipe of a report, with the paper's augmentation, to "
    "its last image, by the paper's preset or its code's; of several configurations the worst counts."
)
_EQUAL_SIZE = (
    f"Held: the numbers are equal in every stored run, save those of another network (recipe "
    f"{', '.join(judges.OTHER_NETWORKS)}). Did not hold: otherwise."
)
_DSPRITES_RUNS = (
    " Counted are models trained on the complete release to the last step of a recipe, with the paper's formula for "
    "the loss at λ = 1 where no other is named, at every γ of the paper's figure and with two seeds or more; of "
    "several configurations the worst counts."
)
_UCSD_RUNS = (
    "Counted are all stored models on complete UCSD Ped1 that follow the recipe of a report to its last epoch, with "
    "runs for all three layers by the rule of the paper or of the authors' code. In every one of them, "
)
CLAIMS = (
    Claim(
        id="MNIST maps",
        text="(i) On MNIST the attention maps highlight what is anomalous and explain the model intuitively.",
        claimed_by="Liu et al. 2020; quoted by Reports 1 and 2",
        chapter="mnist",
        criterion=_ATTENTION_CRITERION.format("paper's map's"),
        judge=judges.judge_attention("attention, paper"),
    ),
    Claim(
        id="MNIST maps of the code",
        text="Claim (i) is confirmed with the maps of the authors' code.",
        claimed_by="Reports 1 and 2",
        chapter="mnist",
        criterion=_ATTENTION_CRITERION.format("map of the authors' code's"),
        judge=judges.judge_attention("attention, authors' code"),
    ),
    Claim(
        id="MNIST share",
        text="A small share of the MNIST maps is less intuitive than the paper's figure suggests (counted by eye).",
        claimed_by="Report 1",
        chapter="mnist",
        criterion=_MNIST_RUNS
        + "A map counts as less intuitive where its own pixel AUROC is below one half (our definition). With the maps "
        "of the authors' code, held: in every run the interval of the measured share meets the published range. "
        "Partly held: in some runs. Did not hold: in none.",
        judge=judges.judge_less_intuitive("attention, authors' code", "attention, paper"),
    ),
    Claim(
        id="MNIST weights",
        text="The authors' trained weights and newly trained ones give identical MNIST maps.",
        claimed_by="Report 1",
        chapter="mnist",
        criterion="Held: over the test outliers, maps from the authors' weights and from ours differ no more than maps "
        "from two of our seeds. Partly held: they differ more, but both pass or both fail claim (i). Did not hold: "
        "otherwise. It needs the authors' weights.",
    ),
    Claim(
        id="MNIST size",
        text="The MNIST model has the number of parameters in Table 1 of Report 1.",
        claimed_by="Report 1",
        chapter="mnist",
        criterion=_EQUAL_SIZE,
        judge=judges.judge_parameters("MNIST"),
    ),
    Claim(
        id="UCSD AUROC",
        text="(ii) On UCSD Ped1 the maps highlight anomalies with the paper's AUROC.",
        claimed_by="Liu et al. 2020; not reproduced by Reports 1 and 2",
        chapter="ucsd",
        criterion=_UCSD_RUNS + "and for each of the three layers, held: the interval of the pixel AUROC lies above one "
        "half and reaches the paper's value. Partly held: it lies above one half and above every baseline, but below "
        "the paper's value. Did not hold: otherwise.",
        judge=judges.judge_ucsd(judges.grade_ucsd_auroc),
    ),
    Claim(
        id="UCSD baseline",
        text="(ii) On UCSD Ped1 the maps do better than the baseline.",
        claimed_by="Liu et al. 2020, as quoted by Report 2",
        chapter="ucsd",
        criterion=_UCSD_RUNS + "held: the paired interval of the pixel AUROC of the best layer minus that of "
        "the reconstruction error of the same model lies above zero. Partly held: it reaches over zero. Did not hold: "
        "it lies below.",
        judge=judges.judge_ucsd(judges.grade_ucsd_baseline),
    ),
    Claim(
        id="UCSD layers",
        text="The layer matters: conv1, conv2 and conv3 give different AUROC (both reports print one value for all).",
        claimed_by="Liu et al. 2020, Table quoted by Report 1",
        chapter="ucsd",
        criterion=_UCSD_RUNS + "held: the paired intervals of the differences in pixel AUROC between the layers all "
        "leave out zero, and conv2 is highest. Partly held: at least one of them does. Did not hold: none does.",
        judge=judges.judge_ucsd(judges.grade_ucsd_layers),
    ),
    Claim(
        id="UCSD size",
        text="The UCSD model has the number of parameters in Table 1 of Report 1.",
        claimed_by="Report 1",
        chapter="ucsd",
        criterion=_EQUAL_SIZE,
        judge=judges.judge_parameters("UCSD Ped1"),
    ),
    Claim(
        id="MVTec AUROC and IoU",
        text="(iii) On MVTec AD the maps localise defects with the paper's AUROC and IoU.",
        claimed_by="Liu et al. 2020; AUROC confirmed by Report 2, both lower in Report 1",
        chapter="mvtec15",
        criterion="Over the complete categories at hand, held: the interval of the pixel AUROC and that of the IoU "
        "reach the paper's values in at least two categories of three. Partly held: one of the two metrics does, or "
        "the AUROC lies above one half in every category. Did not hold: otherwise." + _MVTEC_RUNS,
        judge=judges.judge_mvtec(judges.grade_mvtec_published),
    ),
    Claim(
        id="MVTec other methods",
        text="(iii) On MVTec AD the maps do better than other methods.",
        claimed_by="Liu et al. 2020, as quoted by Reports 1 and 2",
        chapter="mvtec15",
        criterion="Held: in every complete category the interval of the pixel AUROC lies above those of every "
        "baseline that this book runs. Partly held: in more than half of them. Did not hold: otherwise." + _MVTEC_RUNS,
        judge=judges.judge_mvtec(judges.grade_mvtec_baselines),
    ),
    Claim(
        id="MVTec share",
        text="Most MVTec maps, drawn at random, do not show the anomaly (share counted by eye).",
        claimed_by="Report 1",
        chapter="mvtec10",
        criterion="A map misses the anomaly where its own pixel AUROC is below one half (our definition). Held: the "
        "interval of the share over all defective images contains the published share. Partly held: it lies above one "
        "half of the maps. Did not hold: otherwise." + _MVTEC_RUNS,
        judge=judges.judge_mvtec(judges.grade_mvtec_share),
    ),
    Claim(
        id="MVTec size",
        text="The MVTec model has the number of parameters in Table 1 of Report 1.",
        claimed_by="Report 1",
        chapter="mvtec10",
        criterion=_EQUAL_SIZE,
        judge=judges.judge_parameters("MVTec AD"),
    ),
    Claim(
        id="dSprites metric",
        text="AD-FactorVAE reaches a higher disentanglement metric than FactorVAE.",
        claimed_by="Liu et al. 2020; Report 1 quotes it and could not test it",
        chapter="disentanglement",
        criterion="Held: at every γ of the paper the interval over seeds of the difference in the FactorVAE metric "
        "(five factors, held-out votes) lies above zero. Partly held: at some γ. Did not hold: at none."
        + _DSPRITES_RUNS,
        judge=sprite_judges.judge_dsprites(sprite_judges.grade_dsprites_metric, *sprite_judges.SPRITE_METRIC),
    ),
    Claim(
        id="dSprites trade-off",
        text="(iv) The attention loss improves the trade-off between reconstruction and disentanglement.",
        claimed_by="Liu et al. 2020; not reproduced by Report 2",
        chapter="disentanglement",
        criterion="Held: every FactorVAE and β-VAE point is dominated by an AD-FactorVAE point (higher metric, no "
        "higher reconstruction loss). Partly held: some are, and no AD-FactorVAE point is dominated. Did not hold: "
        "otherwise." + _DSPRITES_RUNS,
        judge=sprite_judges.judge_dsprites(sprite_judges.grade_dsprites_tradeoff, *sprite_judges.SPRITE_METRIC),
    ),
    Claim(
        id="dSprites maps",
        text="(v) The attention loss separates the regions to which the latents respond.",
        claimed_by="Liu et al. 2020; not validated by Report 2",
        chapter="disentanglement",
        criterion="Held: over seeds the interval of the mean overlap (the attention loss itself, on test images, over "
        "all pairs of active latents) of AD-FactorVAE lies below that of FactorVAE at every γ. Partly held: at some "
        "γ. Did not hold: at none. The maps are those of the paper at conv4." + _DSPRITES_RUNS,
        judge=sprite_judges.judge_dsprites(sprite_judges.grade_dsprites_maps, *sprite_judges.SPRITE_OVERLAP),
    ),
    Claim(
        id="dSprites λ",
        text="The largest weight λ that was tried gives the highest disentanglement metric.",
        claimed_by="Report 2, experiment 3",
        chapter="disentanglement",
        criterion="Held: over seeds the interval of the FactorVAE metric at the largest λ of Report 2 lies above those "
        "at the smaller ones, at every γ from 10 to 40. Partly held: at some γ. Did not hold: at none."
        + _DSPRITES_RUNS,
        judge=sprite_judges.judge_dsprites(sprite_judges.grade_dsprites_weight, *sprite_judges.SPRITE_METRIC),
    ),
    Claim(
        id="discrepancies",
        text="Where code and paper differ (ReLU, normalised gradients), maps and AUROC are hardly affected.",
        claimed_by="Report 2",
        chapter="ablations",
        criterion="A step hardly matters where the paired interval of the change in pixel AUROC lies within "
        f"± {judges.ABLATION_MARGIN}, with the step switched in the paper's rule and in that of the authors' code, on "
        "every model, and there are models of MNIST, UCSD Ped1 and MVTec AD. It matters where one of these intervals "
        "lies wholly beyond that. Held: both steps hardly matter. Partly held: one hardly matters, the other does. Did "
        "not hold: both matter. Not yet tested: it is undecided whether a step matters. Counted are models of complete "
        "data, trained to the last epoch of their recipe; of several runs on one model that with the most test images. "
        "Reworded after trial runs had been seen: before, a step mattered where an interval reached beyond the margin "
        "and left out zero.",
        judge=judges.judge_discrepancies,
    ),
    Claim(
        id="stacked RBM",
        text="Attention maps of a stacked RBM show no meaningful information on anomalous regions.",
        claimed_by="Report 2",
        chapter="rbm",
        criterion="Held: on MNIST the interval of the maps' pixel AUROC meets or lies below that of the random map, or "
        "the range of the same map with its units renumbered at random. Partly held: it lies above both and below "
        "every baseline. Did not hold: otherwise. The worst run counts, of those with the report's units, -1 and 1, on "
        "the complete MNIST with digits 1 and 3, trained to the last epoch of the recipe. Reworded after trial runs "
        "had been seen: before, renumbered units played no part, and runs with other units counted.",
        judge=judges.judge_stacked_rbm,
    ),
)
