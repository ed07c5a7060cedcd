"""Names of what records hold, for those who compute them and for those who only read: no torch here."""

from collections.abc import Mapping
from typing import Any

# --- what several chapters measure -----------------------------------------------------------------------------------

ATTENTION = "attention"
ERROR = "reconstruction error"
AUROC = "pixel AUROC"
DIFFERENCE = "pixel AUROC, difference"
CHANGE = "pixel AUROC, change"
IMAGE_AUROC = "image AUROC"
BEST_IOU = "best IoU (oracle)"
PARAMETERS = "parameters"
RECONSTRUCTION = "reconstruction per image"
BY_MEAN_IMAGE = "reconstruction per image, mean image"
KL = "KL per image"
ACTIVE = "active units"
PRIOR = "position prior"  # the variance of the training images by pixel, which looks at no test image
CENTRE = "centre prior"
PLACES = (PRIOR, CENTRE)  # maps that look at no test image
KEPT_RANKS = "rank correlation with the trained map"
FLOOR = "two random networks"
LAST = "mean of the last stages"  # by which a run is judged, for measures swing while a network trains
LAST_STAGES = 3
BEST_STAGE = "best stage after the first step (oracle)"
UNTRAINED = "untrained"
PRESETS = ("liu2020_paper", "liu2020_code", "brongers2021", "normal_difference", "most_deviant")
RULES = {  # presets as pages name them
    "liu2020_paper": "paper's rule",
    "liu2020_code": "authors' code",
    "brongers2021": "Brongers et al.",
    "normal_difference": "difference from normal",
    "most_deviant": "most deviant latent",
}
SIMPLE = ("input intensity", ERROR, "mean image difference", CENTRE, "random", PRIOR)  # maps that need no attention

# --- networks that were never trained --------------------------------------------------------------------------------

# By store the layer that its chapter shows, and the map that looks at no test image and has to be beaten.
SHOWN = {"mnist": ("conv2", CENTRE), "ucsd": ("conv2", PRIOR), "mvtec": ("layer2.1.conv1", PRIOR)}
EXPLAINED = "R² on images that the fit has not seen"
POSITION, TOGETHER, EXCHANGED = "position", "all together", "all together, maps exchanged among images"

# --- the digits ------------------------------------------------------------------------------------------------------

CANCELLED = "share of the latents' signed maps that cancels"
BY_BATCH = "÷ RMS of the batch"  # as the authors' code divides the gradient
KINDS = {"attention, paper": "liu2020_paper", "attention, authors' code": "liu2020_code"}
OUTLIERS = "all outliers"
STROKES = ("strokes added", "strokes erased")
WITHIN_INK = "pixel AUROC within ink"
LESS_INTUITIVE = "less intuitive maps"  # per-image AUROC below one half
ABLATED = ("1", "3")  # the digits whose models the ablations look at

# --- Boltzmann machines on the digits ---------------------------------------------------------------------------------

STACKS = ("stacked RBM", "convolutional RBM")
# The VAE's map, the second report's, that at the input, and the paper's where units have places.
MACHINE_MAPS = (
    "attention, VAE",
    "attention, stacked RBM",
    "gradient × input, stacked RBM",
    "attention, convolutional RBM",
)
ENERGIES = ("free energy, fully connected RBM", "free energy, convolutional RBM")
RENUMBERED = "pixel AUROC, units renumbered"
STEEPEST, SUM, ONE_HOT = "largest gradient at a pixel", "sum of the latents", "one-hot score"
VARYING = (
    0.05  # standard deviation over held-out images, in steps from off to on, above which a latent tells them apart
)

# --- a walkway -------------------------------------------------------------------------------------------------------

CONVOLUTIONS = ("conv1", "conv2", "conv3")
TEST_CLIPS = "test clips"  # those that results come from
MASKED_CLIPS = "masked clips"  # with those that the threshold comes from
SWITCHED_LAYER = "conv2"  # whose map is made with one slip after the other
CORRECTED_CASE = ("corrected", "")
BILINEAR = "bilinear, truncated"
RELEASED = "the release's only"
OTHERS_NORMAL = "the release's only, others normal"
# What each case is compared with: one switch apart. The others are compared with the corrected form.
AGAINST = {
    CORRECTED_CASE: None,
    ("masks", OTHERS_NORMAL): ("masks", RELEASED),
    **{("hook, as asked", name): None for name in CONVOLUTIONS},
    **{("hook, first stored", name): ("hook, as asked", name) for name in CONVOLUTIONS},
}

# --- localisation on MVTec AD ----------------------------------------------------------------------------------------

LAYERS = ("conv1", "layer1.0.conv2", "layer1.1.conv2", "layer2.1.conv1", "layer3.1.conv2", "layer4.1.conv2")
# The categories that the first report re-ran.
TEN = ("carpet", "leather", "tile", "wood", "cable", "capsule", "hazelnut", "metal_nut", "pill", "transistor")
COMMON = "mean attention map"  # that of the held-out normal images, the same for every test image
SSIM = "SSIM"
BASELINES = (COMMON, ERROR, SSIM, "mean image difference", "centre prior")
METHODS = (ATTENTION, *BASELINES)
FIELDS = {
    "auroc": AUROC,
    "average_precision": "average precision",
    "aupro": "AUPRO",
    "best_iou": BEST_IOU,
}
SHARED = "share of the attention's variance that all images share"
RESEMBLES = "rank correlation with the attention"
MISSED = "maps that miss the anomaly"  # per-image AUROC below one half

# --- disentanglement on dSprites -------------------------------------------------------------------------------------

SPATIAL = ("conv1", "conv2", "conv3", "conv4")  # the layers whose maps have more than one position
METRIC = "FactorVAE metric"
REFERENCE = "five factors, held-out votes"
PUBLISHED = "six factors, training votes"
# Which latents count as collapsed: by the reference implementation, the second report and Brongers et al.
COLLAPSED = {
    "standard deviation of the mean below 0.05": 0.05,
    "KL below 0.01": 0.01,
    "KL below 0.00001": 0.00001,
}
OVERLAP = "overlap of maps"
EQUALISED = "overlap of maps of equal sum"
PAIRS = ("all pairs of active latents", "the two highest responses")
TRAVERSAL = (-3, -2, -1, 0, 1, 2, 3)  # of one latent, in standard deviations of the prior
GRADIENT = "gradient, norm"
REACHED = "parameters with a gradient"

# --- VAEs that are not the book's -------------------------------------------------------------------------------------

OWN, PACKAGED = "own VAE", "MONAI's VAE"
PICTURES = {OWN: "own", PACKAGED: "packaged"}
MASS = "inliers' map mass / outliers'"
KEPT_SHARE = "share of the gradient kept"
OFF_CAPTUM = "difference from captum"


def plain(category: str) -> str:
    """A category of MVTec AD as it is printed: metal_nut is "metal nut"."""
    return category.replace("_", " ")


def title(parameters: Mapping[str, Any]) -> str:
    """A model in a few words, such as "AD-FactorVAE, γ 40, λ 1"."""
    if parameters["lambda"]:
        return f"AD-FactorVAE, γ {parameters['gamma']}, λ {parameters['lambda']}"
    return f"FactorVAE, γ {parameters['gamma']}" if parameters["gamma"] else f"β-VAE, β {parameters['beta']}"
