"""How many pixels there are of each unit, class and score: counts that stream, merge and are resampled by unit.

The bits of a float32, read as an integer, keep the order of the scores once those of negative numbers are turned
around. A count belongs to a key, class · 2^61 + unit · 2^32 + such an integer, whose low bits are dropped where there
would be too many keys: scores that share the high bits share a cell.

Suffixes: P pixels, T keys in ascending order, U units, G distinct scores, K cells of neighbouring scores, R resamples;
C the classes: normal pixels, anomalous pixels, and the latter's shares of their regions.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Num, UInt32

from expvae.metrics._bootstrap import resampled_weights
from expvae.metrics._segmentation import GRID

CLASS_BIT, UNIT_BIT = 61, 32
CLASSES = 3
MAX_ROWS = 2**22
MAX_DROPPED_BITS = 20  # leaves eight cells from a score to its double, however many units there are

RESAMPLING_CELLS = 2048  # per class
UNITS_PER_CHUNK = 256  # bounds the histograms of units to 25 MB


@dataclass(frozen=True)
class Histogram:
    """Counts of the keys that occur.

    Attributes:
        key_T: The keys, ascending.
        count_T: Number of pixels, or sum of the shares, of each.
        dropped: How many low bits of the keys are dropped, and 0.
    """

    key_T: Int64[np.ndarray, " t"]
    count_T: Int64[np.ndarray, " t"]
    dropped: int

    @property
    def unit_T(self) -> Int64[np.ndarray, " t"]:
        """Unit of each key."""
        return (self.key_T >> UNIT_BIT) & (2 ** (CLASS_BIT - UNIT_BIT) - 1)

    @property
    def score_T(self) -> Float32[np.ndarray, " t"]:
        """Lowest score of each key."""
        return scores(self.key_T)

    def with_units(self, index_U: Int64[np.ndarray, " u"]) -> "Histogram":
        """The same counts with unit u renamed to index_U[u]."""
        if np.array_equal(index_U, np.arange(len(index_U))):
            return self
        unit_T = self.unit_T
        return merged([Histogram(self.key_T + ((index_U[unit_T] - unit_T) << UNIT_BIT), self.count_T, self.dropped)])

    def truth_2U(self, units: int) -> Num[np.ndarray, "2 u"]:
        """Numbers of normal and of anomalous pixels of each unit."""
        return self._summed(self.unit_T, units)[:2]

    @cached_property
    def cells(self) -> tuple[Float32[np.ndarray, " g"], Num[np.ndarray, "c g"], Int64[np.ndarray, " t"]]:
        """The scores that occur, or the lowest ones of cells; the counts of each class; the place of each key."""
        score_G, group_T = np.unique(self.score_T, return_inverse=True)
        return score_G, self._summed(group_T, len(score_G)), group_T

    def _summed(self, place_T: Int64[np.ndarray, " t"], places: int) -> Num[np.ndarray, "c _"]:
        """The counts of each class at each place."""
        sums = np.bincount((self.key_T >> CLASS_BIT) * places + place_T, self.count_T, minlength=CLASSES * places)
        return sums.reshape(CLASSES, places)

    def resampled(
        self, units: int, seed: int, resamples: int, threshold: float | None = None, *, join_runs: bool = False
    ) -> tuple[Float32[np.ndarray, " k"], Float32[np.ndarray, "c r k"], Float64[np.ndarray, " r"]]:
        """Lowest score of each cell; counts of all units, then of every resample of them; the highest score of each.

        Args:
            units: Number of units.
            seed: Seed of the resampling.
            resamples: Number of resamples.
            threshold: Where to split cells, beside the thresholds of the reports.
            join_runs: See `resampling_cells`.
        """
        score_G, count_CG, group_T = self.cells
        cell_G = resampling_cells(score_G, count_CG[:2], threshold, join_runs=join_runs)
        cell_T, unit_T = cell_G[group_T], self.unit_T
        score_K = score_G[np.diff(cell_G, prepend=-1) > 0]
        weight_RU = resampled_weights(units, resamples, seed)
        count_CRK = np.zeros((CLASSES, 1 + resamples, len(score_K)), dtype=np.float32)  # exact up to 2^24 in one cell
        for start in range(0, units, UNITS_PER_CHUNK):
            weight_RV = weight_RU[:, start : start + UNITS_PER_CHUNK]
            shape = (weight_RV.shape[1], len(score_K))
            for kind, count_RK in enumerate(count_CRK):
                first = (kind << CLASS_BIT - UNIT_BIT) + start
                rows = slice(*np.searchsorted(self.key_T, [first << UNIT_BIT, (first + shape[0]) << UNIT_BIT]))
                if rows.start == rows.stop:  # such as the shares of defects, where none are counted
                    continue
                place_T = (unit_T[rows] - start) * shape[1] + cell_T[rows]
                count_VK = np.bincount(place_T, self.count_T[rows], minlength=shape[0] * shape[1]).reshape(shape)
                count_RK += weight_RV @ count_VK.astype(np.float32)
        highest_U = np.full(units, -np.inf)
        last_T = np.append(np.diff(self.key_T >> UNIT_BIT) > 0, True)  # of each class and unit, by ascending scores
        np.maximum.at(highest_U, unit_T[last_T], self.score_T[last_T])
        return score_K, count_CRK, np.where(weight_RU > 0, highest_U, -np.inf).max(axis=1)


def keys(
    score_P: Float32[np.ndarray, " p"], class_P: Bool[np.ndarray, " p"] | int, unit_P: Int64[np.ndarray, " p"] | int
) -> Int64[np.ndarray, " p"]:
    """The keys of pixels, without a bit dropped."""
    key_P = ordered(score_P).astype(np.int64)
    key_P += np.left_shift(class_P, CLASS_BIT, dtype=np.int64)
    key_P += np.left_shift(unit_P, UNIT_BIT, dtype=np.int64)
    return key_P


def counted(key_P: Int64[np.ndarray, " p"], dropped: int) -> Histogram:
    """The histogram of pixels, once their low bits are dropped; their keys are sorted in place."""
    key_P >>= dropped
    key_P.sort()
    start_T = _starts(key_P)
    return Histogram(key_P[start_T] << dropped, np.diff(start_T, append=len(key_P)), dropped)


def merged(parts: list[Histogram], dropped: int = 0, max_rows: int | None = None) -> Histogram:
    """The sum of histograms, with at least so many bits dropped, and more if there would be more than max_rows keys.

    How many that are follows from all keys together, not from which histogram holds them.
    """
    key_T = np.concatenate([part.key_T for part in parts])
    order_T = np.argsort(key_T, kind="stable")  # which is quick on sorted runs
    key_T = key_T[order_T]
    dropped = max([dropped, *(part.dropped for part in parts)])
    change_T = key_T[1:] ^ key_T[:-1]
    while max_rows and np.count_nonzero(change_T >> dropped) >= max_rows and dropped < MAX_DROPPED_BITS:
        dropped += 1
    key_T = key_T >> dropped << dropped
    start_T = _starts(key_T)
    count_T = np.concatenate([part.count_T for part in parts])[order_T]
    return Histogram(key_T[start_T], np.add.reduceat(count_T, start_T) if len(start_T) else count_T, dropped)


def ordered(score_P: Float32[np.ndarray, " p"]) -> UInt32[np.ndarray, " p"]:
    """Integers in the order of the scores: the bits, all turned for negative scores, the sign turned for others."""
    bits_P = (score_P + np.float32(0)).view(np.int32)  # -0 becomes 0
    ordered_P = bits_P >> 31  # -1 for negative scores, 0 for others
    ordered_P |= np.int32(-(2**31))
    ordered_P ^= bits_P
    return ordered_P.view(np.uint32)


def scores(key_T: Int64[np.ndarray, " t"]) -> Float32[np.ndarray, " t"]:
    """The scores of ordered integers, whatever stands above their 32 bits."""
    ordered_T = key_T.astype(np.uint32).view(np.int32)
    return (ordered_T ^ (~(ordered_T >> 31) | np.int32(-(2**31)))).view(np.float32)


def resampling_cells(
    score_G: Float32[np.ndarray, " g"],
    count_2G: Num[np.ndarray, "2 g"],
    threshold: float | None = None,
    *,
    join_runs: bool = False,
) -> Int64[np.ndarray, " g"]:
    """Cell of every distinct score: quantiles of both classes, split at the thresholds of the IoU.

    A score that reaches over a quantile, of the mean of the distributions of both classes, has a cell of its own.

    For the AUROC alone, neighbouring scores of one class may first be joined to a run, which is exact because no pair
    of it counts; a score that both classes share is a run by itself, exact because its pairs are ties. Only cells that
    several runs share lose order then.
    """
    run_G = np.arange(len(score_G))
    limits = np.append(GRID * float(score_G[-1]), [] if threshold is None else threshold).astype(np.float32)
    above_G = np.searchsorted(np.sort(limits), score_G, side="right")
    if join_runs:
        kind_G = (count_2G > 0).T @ [1, 2]
        run_G = np.cumsum(np.append(True, (np.diff(kind_G) != 0) | (kind_G[1:] == 3))) - 1
        above_G = np.zeros_like(run_G)
    if run_G[-1] < 2 * RESAMPLING_CELLS:
        return run_G
    end_R = sum(np.bincount(run_G, count_G).cumsum() / count_G.sum() for count_G in count_2G)
    quantile_R = np.floor(np.append(0, end_R) * RESAMPLING_CELLS)
    # Each of the three grows with the score, so that their sum changes wherever one of them does.
    sum_G = (quantile_R[:-1] + quantile_R[1:])[run_G] + above_G
    return np.cumsum(np.diff(sum_G, prepend=sum_G[0]) > 0)


def _starts(key_P: Int64[np.ndarray, " p"]) -> Int64[np.ndarray, " t"]:
    """Where each run of equal keys starts."""
    return np.flatnonzero(np.concatenate([np.ones(min(1, len(key_P)), bool), key_P[1:] != key_P[:-1]]))
