"""Plants 40 small faults into the library, one at a time, and runs the tests that must notice each.

    python tests/mutations.py                     # all, two at a time; three to five minutes
    python tests/mutations.py --list              # what they are, and which tests kill them
    python tests/mutations.py kl-term auroc-ties  # some of them

A test suite can be shortened as long as every fault is still killed: some test that is named beside it fails. It
proves nothing of faults that are not planted here. Not collected by pytest; to be run by hand, from a checkout.

Everything happens in copies of the checkout, so that the work tree is never touched. A fault that makes Python
refuse the code (an error at import, or in a fixture) tells nothing of the tests and counts as an error, not as killed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS = 600  # that the tests of one fault may take, in case it makes them go on for ever
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0")
ORIGINS = "import sys, importlib.util as i; print(*(i.find_spec(name).origin for name in sys.argv[1:]), sep='\\n')"

# A heading with name and file; the tests that kill it, ">"; lines taken out, "-"; lines put in, "+". What is taken out
# occurs once in the file. It may begin and end within a line; lines that follow the first keep their indentation.
FAULTS = r"""
# attention-relu-dropped lib/expvae/_attention.py
>tests/test_attention.py::test_paper_map_by_hand
-return self.linear_BIHW.relu()
+return self.linear_BIHW
# attention-interpolation-mode lib/expvae/_attention.py
>tests/test_attention.py::test_code_preset_equals_direct_reading
-size=size, mode="bilinear"
+size=size, mode="bicubic"
# attention-normaliser-swapped lib/expvae/_gradients.py
>tests/test_attention.py::test_code_preset_equals_direct_reading
-over = (2, 3, 4) if normaliser == "image"
+over = (2, 3, 4) if normaliser == "batch"
# gradient-pooled-without-gate lib/expvae/_gradients.py
>tests/test_gradients.py::test_every_route_equals_the_slow_loop
-gated or node.name() not in COPIES
+gated and node.name() not in COPIES
# input-relu-before-channels lib/expvae/_input_attention.py
>tests/test_input_attention.py::test_the_map_is_that_of_captum_for_each_latent
-.sum(2).relu().sum(0)
+.relu().sum(2).sum(0)
# mnist-relu-dropped lib/expvae/models/_mnist.py
>tests/test_models.py::test_vaes_equal_their_definition
-nn.Linear(128 * 7 * 7, 1024),
-                relu3=nn.ReLU(),
+nn.Linear(128 * 7 * 7, 1024),
+                relu3=nn.Identity(),
# rbm-spin-free-energy lib/expvae/models/_rbm.py
>tests/test_rbm.py::test_energy_and_free_energy_are_those_of_the_definition
-else F.softplus(logits) - logits / 2
+else F.softplus(logits)
# kl-term lib/expvae/_losses.py
>tests/test_training.py::test_kl_divergence_equals_that_of_torch_distributions
-(mu_BI.square() + logvar_BI.exp() - 1 - logvar_BI)
+(mu_BI.square() + logvar_BI.exp() - 1)
# reconstruction-mean-for-sum lib/expvae/_losses.py
>tests/test_training.py::test_reconstruction_loss_is_the_cross_entropy_of_the_probabilities
-.flatten(1).sum(1)
-
-
-def kl_divergence
+.flatten(1).mean(1)
+
+
+def kl_divergence
# contrastive-sign lib/expvae_book/contrastive.py
>tests/test_rbm.py::test_persistent_contrastive_divergence_is_that_of_scikit_learn_step_by_step
-model.activate(fields), -1.0)
+model.activate(fields), 1.0)
# total-correlation-sign lib/expvae/_losses.py
>tests/test_factorvae.py::test_total_correlation_is_the_difference_of_the_log_probabilities
-(logits_MB2[..., 0] - logits_MB2[..., 1]).mean(1)
+(logits_MB2[..., 1] - logits_MB2[..., 0]).mean(1)
# discriminator-slope-sign lib/expvae_book/factorvae_losses.py
>tests/test_factorvae.py::test_steps_equal_those_of_a_plain_loop
-[-torch.sigmoid(-d_MB[:, :draws])
+[torch.sigmoid(-d_MB[:, :draws])
# constant-alpha-not-detached lib/expvae_book/factorvae_losses.py
>tests/test_factorvae.py::test_what_the_attention_loss_moves
-second_order = graph and penalty.alpha == "second_order"
+second_order = graph
# auroc-ties lib/expvae/metrics/_segmentation.py
>tests/test_metrics.py::test_auroc_by_hand
-- negative_K / 2
+- negative_K
# average-precision-ties lib/expvae/metrics/_segmentation.py
>tests/test_segmentation.py::test_measures_equal_sklearn_with_ties
-(positive_RK * precision_RK)
+(positive_RK * np.roll(precision_RK, 1, axis=1))
# aupro-limit lib/expvae/metrics/_segmentation.py
>tests/test_segmentation.py::test_aupro_equals_a_slow_loop
-np.interp(FPR_LIMIT, fpr_K, overlap_K)
+overlap_K[below_K][-1]
# iou-of-defective-images lib/expvae/metrics/_iou.py
>tests/test_iou.py::test_every_convention_equals_sklearn
-(counts[2] > 0).astype(np.float64)
+(counts[2] >= 0).astype(np.float64)
# difference-unpaired lib/expvae/metrics/_streaming.py
>tests/test_streaming.py::test_auroc_difference_equals_a_slow_loop
-- second.resampled_aurocs(seed, resamples)
+- second.resampled_aurocs(seed + 1, resamples)
# mask-none-as-normal lib/expvae/metrics/_inputs.py
>tests/test_segmentation.py::test_images_without_a_mask_are_left_out_or_normal
-mask is not None or without_mask == "normal" for
+True for
# factor-vae-without-scale lib/expvae/metrics/_disentanglement.py
>tests/test_disentanglement_metrics.py::test_metric_equals_a_slow_loop_over_votes
-.var(dim=1) / variance_I
+.var(dim=1)
# mig-gap-to-the-worst lib/expvae/metrics/_disentanglement.py
>tests/test_disentanglement_metrics.py::test_mig_equals_sums_over_a_table_of_counts
-np.sort(information_IK, axis=0)[-2:]
+np.sort(information_IK, axis=0)[[0, -1]]
# dci-completeness-axis lib/expvae/metrics/_disentanglement.py
>tests/test_disentanglement_metrics.py::test_dci_equals_loops_over_its_importances
-_concentration(importance_IK.T).mean()
+_concentration(importance_IK).mean()
# active-units-by-deviation lib/expvae/metrics/_latent.py
>tests/test_latent.py::test_active_units_counts_latents_whose_mean_varies
-torch.var(mu_NI, dim=0)
+torch.std(mu_NI, dim=0)
# image-score-least-for-highest lib/expvae_book/measures.py
>tests/test_measures.py::test_rows_of_a_map_are_scikit_learns
-map_NYX.amax((1, 2))
+map_NYX.amin((1, 2))
# centre-prior-off-by-half lib/expvae_book/baselines.py
>tests/test_baselines.py::test_centre_prior_follows_its_equation
-(torch.arange(size) - (size - 1) / 2)
+(torch.arange(size) - size / 2)
# store-not-atomic lib/expvae_book/files.py
>tests/test_runs.py::test_a_failed_save_leaves_the_earlier_run_alone
-temporary.mkdir()
+shutil.rmtree(folder, ignore_errors=True)
+            temporary.mkdir()
# store-takes-nan lib/expvae_book/runs.py
>tests/test_runs.py::test_what_json_cannot_hold_is_refused
-json.dumps(value, allow_nan=False)
+json.dumps(value, allow_nan=True)
# store-auto-prefers-sample lib/expvae_book/runs.py
>tests/test_runs.py::test_auto_prefers_real_data
-"data": ("real", "sample")
+"data": ("sample", "real")
# store-metric-of-any-subset lib/expvae_book/runs.py
>tests/test_claims.py::test_other_methods_subsets_and_missing_values_do_not_match
-(one["metric"], one["method"], one["subset"]) == (metric, method, subset)
+(one["metric"], one["method"]) == (metric, method)
# parameter-above-takes-its-bound lib/expvae_book/parameters.py
>tests/test_chapters.py::test_values
-math.nextafter(float(above), math.inf)
+float(above)
# parameter-false-is-true lib/expvae_book/parameters.py
>tests/test_chapters.py::test_values
-str(given).strip() in ("True", "true")
+bool(given)
# parameter-any-choice lib/expvae_book/parameters.py
>tests/test_chapters.py::test_values
-(self.choices and value not in self.choices)
+(self.choices and not value)
# parameter-unknown-ignored lib/expvae_book/engine.py
>tests/test_chapters.py::test_bad_parameter_stops_the_command_before_anything_runs
-in parameters.items() if name not in paths}
+in parameters.items() if name in known}
# verdict-effect-half-within lib/expvae_book/judges.py
>tests/test_claims.py::test_hardly_any_effect_takes_an_interval_close_to_zero
--margin <= row["low"] and row["high"] <= margin
+-margin <= row["low"] or row["high"] <= margin
# verdict-without-holm lib/expvae_book/judging.py
>tests/test_verdicts.py::test_many_comparisons_take_more
-(len(p_K) - rank) * p_K[place]
+1 * p_K[place]
# verdict-interval-may-hold-zero lib/expvae_book/judging.py
>tests/test_verdicts.py::test_directions
-"undecided" if p > LEVEL
+"undecided" if p > 1
# published-digits-rounded lib/expvae_book/publications.py
>tests/test_claims.py::test_published_numbers_keep_their_digits
-if text.isdecimal() else text
+if text.isdecimal() else f"{float(text):g}"
# data-missing-mask-is-empty lib/expvae_book/data/images.py
>tests/test_mvtec_data.py::test_some_masks
>tests/test_mvtec_data.py::test_no_masks
-        masks.append(None)
+        masks.append(torch.zeros(size, size, dtype=torch.bool))
# data-altered-is-complete lib/expvae_book/data/card.py
>tests/test_data.py::test_altered_mnist_of_official_counts_is_partial
-if counts == official and not altered else "partial"
+if counts == official else "partial"
# data-split-rounds-down lib/expvae_book/data/ucsd.py
>tests/test_ucsd_data.py::test_split
-round(len(clips) / 5)
+len(clips) // 5
"""


@dataclass(frozen=True)
class Mutation:
    """A fault that is planted.

    Attributes:
        name: Short name.
        file: The file that it is planted into, relative to the repository.
        old: Text that occurs once in the file.
        new: What takes its place.
        tests: Node ids of the tests of which at least one fails then.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _read(faults: str) -> Iterator[Mutation]:
    for fault in re.split(r"^# ", faults, flags=re.MULTILINE)[1:]:
        heading, *lines = fault.splitlines()
        name, file = heading.split()
        tests, old, new = ([line[1:] for line in lines if line[0] == sign] for sign in ">-+")
        yield Mutation(name, file, "\n".join(old), "\n".join(new), tuple(tests))


MUTATIONS = tuple(_read(FAULTS))


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: With status 1 unless every fault asked for is killed.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help="faults to plant; all by default")
    parser.add_argument("--list", action="store_true", help="list the faults and plant none")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="faults at a time, each in a copy (2)")
    given = parser.parse_args()
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := [name for name in given.names if name not in known]:
        sys.exit(f"There is no mutation {', '.join(unknown)}; there are {', '.join(known)}.")
    chosen = [known[name] for name in given.names] or list(MUTATIONS)
    for mutation in chosen:
        times = (REPOSITORY / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        if times != 1:
            sys.exit(f"{mutation.name}: {mutation.old!r} occurs {times} times in {mutation.file}, and must occur once.")
    if given.list:
        for mutation in chosen:
            print(mutation.name, mutation.file, *mutation.tests, sep="\n    ")
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        made = [_copy(Path(folder).resolve() / str(number)) for number in range(max(1, given.jobs))]
        _require_sound(made[0], chosen)
        copies: Queue[Path] = Queue()
        list(map(copies.put, made))
        with ThreadPoolExecutor(len(made)) as pool:
            killed = sum(pool.map(lambda mutation: _killed(mutation, copies), chosen))
    print(f"{killed} of {len(chosen)} killed, in {time.monotonic() - started:.0f} s")
    sys.exit(killed < len(chosen))


def _copy(to: Path) -> Path:
    """The files of the checkout, with new ones and changes, but without stored runs, which no test named here reads."""
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (REPOSITORY / name).is_file() and not name.startswith("runs/"):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, to / name)
    return to


def _python(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a copy; its library comes first, whatever is installed."""
    own = {
        "PYTHONPATH": os.pathsep.join([str(copy / "lib"), str(copy)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = (sys.executable, *words)
    return subprocess.run(command, cwd=copy, env=os.environ | own, capture_output=True, text=True, timeout=SECONDS)


def _module(file: str) -> str:
    return file.removeprefix("lib/").removesuffix(".py").replace("/", ".")


def _last_line(found: subprocess.CompletedProcess[str]) -> str:
    return ["", *(found.stderr + found.stdout).strip().splitlines()][-1]


def _require_sound(copy: Path, chosen: Sequence[Mutation]) -> None:
    """Stop unless the copy's own modules are imported, and all tests pass while nothing is planted."""
    files = list(dict.fromkeys(mutation.file for mutation in chosen))
    origins = _python(copy, "-c", ORIGINS, *map(_module, files))
    if origins.stdout.splitlines() != [str(copy / file) for file in files]:
        sys.exit(f"Python does not import the modules of the copy:\n{origins.stdout}{origins.stderr}")
    tests = dict.fromkeys(test for mutation in chosen for test in mutation.tests)
    found = _python(copy, *PYTEST, *tests)
    if found.returncode != 0:
        sys.exit(f"The tests must pass while nothing is planted:\n{found.stdout}{found.stderr}")
    print(f"without a fault: {_last_line(found)}", flush=True)


def _killed(mutation: Mutation, copies: "Queue[Path]") -> bool:
    copy, started = copies.get(), time.monotonic()
    file = copy / mutation.file
    sound = file.read_text(encoding="utf-8")
    file.write_text(sound.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        found = _python(copy, *PYTEST, *mutation.tests)
        last = _last_line(found)
        failed = found.returncode == 1 and re.search(r"\b\d+ failed\b", last)
        outcome = "killed" if failed else "SURVIVED" if found.returncode == 0 else f"error: {last}"
    except subprocess.TimeoutExpired:
        outcome = f"error: its tests took more than {SECONDS} s"
    finally:
        file.write_text(sound, encoding="utf-8")
        copies.put(copy)
    print(f"{mutation.name:40} {outcome}, {time.monotonic() - started:.0f} s", flush=True)
    return outcome == "killed"


if __name__ == "__main__":
    main()
