"""The measures of `expvae.metrics._segmentation` for any number of pixels, from counts that stream and merge.

The bits of a float32, read as an integer, keep the order of the scores once those of negative numbers are turned
around. Up to 2^22 pixels are kept as they are, and every measure is exact. Beyond that, each class is counted in cells
of scores that share their high bits: as many bits as make no more than 2^19 cells from the lowest score to the highest.

Nothing depends on the order or the grouping in which pixels were added and counts merged, to the last bit: all counts
are whole numbers, and how fine the cells are follows from the number and the range of all scores.

Suffixes: B images of a batch, P pixels and A the anomalous ones among them, U units, T rows of a table, K cells, G
distinct scores, R resamples; C columns of counts: normal pixels, anomalous pixels and, if asked for, shares of regions.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Shaped, UInt32

from expvae.metrics._bootstrap import Interval, percentile_interval, resampled_weights
from expvae.metrics._inputs import Array, Masks, WithoutMask, as_array, require_resampling, with_masks
from expvae.metrics._pixel import _auroc_from_counts
from expvae.metrics._segmentation import GRID, PixelScores, from_counts, region_sizes

Unit = str | int

EXACT_PIXELS = 2**22
BUFFERED_PIXELS = 2**24  # without units and regions, which take more memory; with them, EXACT_PIXELS
MAX_CELLS = 2**19
MAX_ROWS = 2**22
PIXELS_PER_TABLE = 2**21  # brought into the table at a time, which takes four times its memory
MAX_DROPPED_BITS = 20  # leaves eight cells from a score to its double
PIXELS_PER_BLOCK = 2**17  # few enough to stay in the cache, enough for two threads not to wait for each other
THREADS = 2
SHARE = 2**40  # a region in whole numbers: off by 1e-8 of it at 20 000 pixels, and room for 8 million regions

RESAMPLING_CELLS = 2048  # per class
UNITS_PER_CHUNK = 256  # bounds the histograms of units to 25 MB


class PixelMetrics:
    """Counts of normal and anomalous pixels by score: add batches, merge counts, read the measures.

        counts = PixelMetrics()
        for map_BYX, mask_BYX, clip_B in batches:
            counts.update(map_BYX, mask_BYX, unit=clip_B)
        counts.compute().auroc
        counts.intervals(seed=0)["auroc"]

    One object holds the pixels that are pooled. For a number per category keep a dict of objects, and merge them for
    the number over all; a number per image needs no stream: see `expvae.metrics.exact`.

    Memory is bounded: 10^8 pixels took 0.4 GB beyond the batch, and 0.9 GB with regions and 10 000 units. Units have a
    table of some 2^22 rows, one per unit and score that occurs in it; where there would be more, scores whose high bits
    agree share one.

    Beyond 2^22 pixels a cell is 2^-11 of its score wide where scores reach from 0 to a maximum, and narrower if their
    range is. Measured on 2·10^7 pixels, 2 % of them anomalous, the cells changed the AUROC by 5e-8, the average
    precision by up to 2e-4, the IoU by up to 2e-5 and the FPR by up to 1e-4. The worst case is a narrow cluster of
    scores far from some others: where exact zeros joined scores that all lay within 1 % of each other, the AUROC was
    off by 1e-3 and the average precision by 8e-3, and both are by more the narrower the cluster.

    Attributes:
        regions: Whether AUPRO is computed, which needs masks of shape [B, Y, X] and more time.
        without_mask: What becomes of images without a mask: "leave out", or "normal" for all pixels normal.
        images: Number of images that count, with those of which `where` leaves out every pixel.
        images_left_out: Number of images left out because they have no mask.
    """

    def __init__(self, *, regions: bool = False, without_mask: WithoutMask = "leave out"):
        with_masks(np.zeros(0), np.zeros(0, dtype=bool), without_mask)  # refuses what it will not know in `update`
        self.regions = regions
        self.without_mask = without_mask
        self.images = 0
        self.images_left_out = 0
        self._lowest, self._highest = np.inf, -np.inf
        self._unit_index: dict[Unit, int] = {}  # in the order of appearance
        self._pixels = 0
        self._buffer = _Buffer()  # the last pixels; all of them while they are few
        self._cells: _Cells | None = None  # the others
        self._table: _Table | None = None  # the others by unit

    def update(
        self,
        score_BYX: Shaped[Array, "b ..."],
        truth_BYX: Masks,
        unit: Shaped[Array, " b"] | Sequence[Unit] | None = None,
        *,
        where: Shaped[Array, "b ..."] | None = None,
    ) -> None:
        """Count the pixels of a batch of images.

        Args:
            score_BYX: Finite scores on any device, higher for more anomalous, rounded to float32; the first axis
                counts images. A score per image has shape [B].
            truth_BYX: Booleans of the same shape, True where anomalous; or one mask per image, None where there is
                none.
            unit: Number or name per image of what is resampled for intervals: the image itself, or its clip. Images
                of one unit may come in several batches. Only intervals need it, and then in every batch.
            where: Booleans of the scores' shape; pixels where it is False, such as those where nothing moves, do not
                count. An image of which none counts is still one of `images`, and its unit one of those that are
                resampled, as in `expvae.metrics.auroc_interval`. Not with regions, which count whole.

        Raises:
            ValueError: If the shapes differ, a mask or where is not boolean, a score is NaN or infinite, where is given
                with regions, or units are not given as described. Nothing of the batch is counted then.
        """
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused
            score_BYX = as_array(score_BYX).astype(np.float32, copy=False)
        score_MYX, truth_MYX, image_M = with_masks(score_BYX, truth_BYX, self.without_mask)
        unit_B = None if unit is None else _unit_names(unit, len(score_BYX))
        self._require_alike(unit_B)
        score_P, truth_P, share_P = score_MYX.ravel(), truth_MYX.ravel(), None
        pixels_M = np.full(len(score_MYX), np.prod(score_MYX.shape[1:], dtype=np.int64))
        if where is not None:
            where_MYX = self._checked_where(where, score_BYX.shape)[image_M]
            score_P, truth_P = score_MYX[where_MYX], truth_MYX[where_MYX]
            pixels_M = where_MYX.sum(axis=tuple(range(1, where_MYX.ndim)), dtype=np.int64)
        if self.regions:
            share_P = np.zeros(len(truth_P), dtype=np.int64)
            share_P[truth_P] = np.rint(SHARE / region_sizes(truth_MYX))

        self.images += len(score_MYX)
        self.images_left_out += len(score_BYX) - len(score_MYX)
        self._lowest = min(self._lowest, float(score_P.min(initial=np.inf)))
        self._highest = max(self._highest, float(score_P.max(initial=-np.inf)))
        unit_P = None if unit_B is None else np.repeat(self._indices(unit_B[image_M]), pixels_M)
        self._take(_Pixels(score_P, truth_P, unit_P, share_P))

    def merge(self, other: "PixelMetrics") -> None:
        """Add all that another object counted; the other one stays as it is.

        Raises:
            ValueError: If only one of the two has regions, units or another rule for images without a mask.
        """
        if (self.regions, self.without_mask) != (other.regions, other.without_mask):
            raise ValueError("other must have the same regions and without_mask as the counts that it is merged into.")
        if other.images:
            self._require_alike(list(other._unit_index) or None)
        index_U = self._new_indices(list(other._unit_index))
        self.images += other.images
        self.images_left_out += other.images_left_out
        self._lowest, self._highest = min(self._lowest, other._lowest), max(self._highest, other._highest)
        if other._cells is not None:
            total = self._no_cells()
            for cells in filter(None, (self._cells, other._cells)):
                total.count_CK[:] += cells.over(total).count_CK
            self._cells = total
        if other._table is not None:
            self._table = _merged(self._table, other._table.with_units(index_U))
        self._pixels += other._pixels - other._buffer.size
        self._take(other._buffer.pixels().with_units(index_U))

    def compute(self, threshold: float | None = None) -> PixelScores:
        """All measures of the pixels added so far.

        Args:
            threshold: Threshold, such as one chosen on validation images, at which to compute the IoU as well. It is
                rounded to float32, and beyond 2^22 pixels up to the lowest score of a cell.

        Raises:
            ValueError: If a class is missing.
        """
        if self._pixels > EXACT_PIXELS:
            self._count_buffer()
            score_K, count_CK = self._cells.scores(), self._cells.count_CK
        else:
            table = _tabulated(replace(self._buffer.pixels(), unit_P=None))
            score_K, count_CK = _scores(table.code_T), table.count_CT
        return from_counts(score_K, *count_CK, highest=self._highest, threshold=threshold)

    def intervals(
        self, *, seed: int, threshold: float | None = None, resamples: int = 1000, level: float = 0.95
    ) -> dict[str, Interval]:
        """Percentile bootstrap intervals over units, of all measures at once.

        Whole units are drawn with replacement, because the pixels of one image, and the images of one clip, are not
        independent. Scores of the same units, which are taken in sorted order, under the same seed see the same
        resamples. A resample without both classes has no measures and is left out.

        The values are those of `compute`. A resample is a weighted sum of one histogram per unit and class, whose cells
        hold one score, or at most 1/2048 of the pixels of each class. What the cells change in the measures of the
        whole sample is taken off the percentiles.

        Args:
            seed: Seed of the resampling.
            threshold: As for `compute`.
            resamples: Number of bootstrap resamples, at least 100.
            level: Confidence level, between 0 and 1.

        Returns:
            For every field of `PixelScores` that is not None, its value, the two percentiles and the number of units.

        Raises:
            ValueError: If there are fewer than two units, a class is missing, or resamples or level are out of range.
        """
        require_resampling(resamples, level)
        value = _numbers(self.compute(threshold))
        drawn = _resampled(self._by_sorted_unit(), len(self._unit_index), seed, threshold, resamples)
        return _intervals(value, drawn, level, len(self._unit_index))

    def auroc_interval(self, *, seed: int, resamples: int = 1000, level: float = 0.95) -> Interval:
        """The AUROC of `intervals` alone, the same to rounding, for all resamples at once, which is far quicker.

        Raises:
            ValueError: As for `intervals`.
        """
        require_resampling(resamples, level)
        n_units = len(self._unit_index)
        drawn = _resampled_aurocs(self._by_sorted_unit(), n_units, seed, resamples)
        return _auroc_interval(self.compute().auroc, drawn, level, n_units)

    def _require_alike(self, unit_B: Shaped[np.ndarray, " b"] | list[Unit] | None) -> None:
        """Raise a ValueError if units are given here but were not so far, the reverse, or of the other kind."""
        if self.images == 0:
            return
        if (unit_B is None) != (not self._unit_index):
            raise ValueError("unit must be given with every batch or with none.")
        named = isinstance(next(iter(self._unit_index), None), str)
        if unit_B is not None and len(unit_B) and isinstance(unit_B[0], str) != named:
            raise ValueError("unit must hold numbers in every batch or names in every batch.")

    def _checked_where(self, where: Shaped[Array, "..."], shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
        if self.regions:
            raise ValueError("where cannot be given with regions=True, because a region counts with all of its pixels.")
        where = as_array(where)
        if where.shape != shape or where.dtype != bool:
            raise ValueError(f"where must be boolean of shape {shape}, got {where.dtype} of shape {where.shape}.")
        return where

    def _indices(self, unit_M: Shaped[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """Index of each image's unit; a Python object per unit and not per image, of which there may be many more."""
        unit_U, first_U, place_M = np.unique(unit_M, return_index=True, return_inverse=True)
        order_U = np.argsort(first_U)
        index_U = np.empty(len(unit_U), dtype=np.int64)
        index_U[order_U] = self._new_indices(unit_U[order_U].tolist())
        return index_U[place_M]

    def _new_indices(self, unit_U: list[Unit]) -> Int64[np.ndarray, " u"]:
        return np.array([self._unit_index.setdefault(unit, len(self._unit_index)) for unit in unit_U], dtype=np.int64)

    def _take(self, pixels: "_Pixels") -> None:
        self._pixels += len(pixels.score_P)
        limit = EXACT_PIXELS if self.regions or self._unit_index else BUFFERED_PIXELS
        while len(pixels.score_P) > limit - self._buffer.size:
            room = limit - self._buffer.size
            self._buffer.append(pixels.part(slice(None, room)))
            self._count_buffer()
            pixels = pixels.part(slice(room, None))
        self._buffer.append(pixels)

    def _count_buffer(self) -> None:
        """Move the pixels of the buffer to the cells and the table."""
        empty = self._no_cells()
        self._cells = empty if self._cells is None else self._cells.over(empty)
        self._cells.count(self._buffer.pixels())
        if self._unit_index:
            self._table = self._by_unit()
        self._buffer.size = 0

    def _no_cells(self) -> "_Cells":
        return _Cells.empty(self._lowest, self._highest, columns=3 if self.regions else 2)

    def _by_unit(self) -> "_Table":
        table, pixels = self._table, self._buffer.pixels()
        for start in range(0, self._buffer.size, PIXELS_PER_TABLE):
            part = pixels.part(slice(start, start + PIXELS_PER_TABLE))
            table = _merged(table, _tabulated(part, table.dropped if table else 0))
        return table

    def _by_sorted_unit(self) -> "_Table":
        names = np.array(list(self._unit_index))
        if len(names) < 2:
            raise ValueError(f"unit must name at least two units to resample, got {len(names)}.")
        return self._by_unit().with_units(np.argsort(np.argsort(names)))


def difference_intervals(
    first: PixelMetrics,
    second: PixelMetrics,
    *,
    seed: int,
    threshold: float | None = None,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Paired bootstrap intervals of the measures of first minus those of second, for two scores of the same images.

    Both see the same resamples of the units, so that what makes an image hard for both cancels. See
    `PixelMetrics.intervals` for the arguments, the resamples and what is returned.

    Raises:
        ValueError: As for `PixelMetrics.intervals`, or if the units, or the numbers of their normal and anomalous
            pixels, differ.
    """
    require_resampling(resamples, level)
    if first.regions != second.regions:
        raise ValueError("first and second must have the same regions.")
    values = [_numbers(counts.compute(threshold)) for counts in (first, second)]
    tables, n_units = _paired_tables(first, second), len(first._unit_index)
    drawn = zip(*(_resampled(table, n_units, seed, threshold, resamples) for table in tables), strict=True)
    differences = [None if None in pair else _difference(*pair) for pair in drawn]
    return _intervals(_difference(*values), differences, level, n_units)


def auroc_difference(
    first: PixelMetrics, second: PixelMetrics, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """The AUROC of `difference_intervals` alone, the same to rounding, for all resamples at once.

    Raises:
        ValueError: As for `difference_intervals`; regions play no part.
    """
    require_resampling(resamples, level)
    value = first.compute().auroc - second.compute().auroc
    n_units = len(first._unit_index)
    drawn = [_resampled_aurocs(table, n_units, seed, resamples) for table in _paired_tables(first, second)]
    return _auroc_interval(value, drawn[0] - drawn[1], level, n_units)


def _paired_tables(first: PixelMetrics, second: PixelMetrics) -> "list[_Table]":
    """The tables of both, by unit; a ValueError unless they have the same units with the same truth."""
    tables = [counts._by_sorted_unit() for counts in (first, second)]
    n_units = len(first._unit_index)
    if set(first._unit_index) != set(second._unit_index) or not np.array_equal(
        *(table.truth_2U(n_units) for table in tables)
    ):
        raise ValueError("first and second must hold the same units with the same truth.")
    return tables


@dataclass(frozen=True)
class _Pixels:
    """Pixels as they are; without units `unit_P` is None, without regions `share_P` is."""

    score_P: Float32[np.ndarray, " p"]
    truth_P: Bool[np.ndarray, " p"]
    unit_P: Int64[np.ndarray, " p"] | None
    share_P: Int64[np.ndarray, " p"] | None

    def part(self, which: slice) -> "_Pixels":
        return _Pixels(*(None if column is None else column[which] for column in vars(self).values()))

    def with_units(self, index_U: Int64[np.ndarray, " u"]) -> "_Pixels":
        """The same pixels with unit u renamed to index_U[u]."""
        return self if self.unit_P is None else replace(self, unit_P=index_U[self.unit_P])


class _Buffer:
    """Copies of pixels, in memory that serves again once they are counted: new memory is slower than the counting."""

    def __init__(self):
        self.size = 0
        self._columns = (np.zeros(0, dtype=np.float32), np.zeros(0, dtype=bool), None, None)

    def pixels(self) -> _Pixels:
        return _Pixels(*self._columns).part(slice(self.size))

    def append(self, pixels: _Pixels) -> None:
        if len(pixels.score_P) == 0:
            return
        start, self.size = self.size, self.size + len(pixels.score_P)
        if self.size > len(self._columns[0]):
            filled = self._columns
            self._columns = tuple(
                None if new is None else np.empty(max(self.size, 2 * start), dtype=new.dtype)
                for new in vars(pixels).values()
            )
            for column, old in zip(self._columns, filled, strict=True):
                if old is not None and column is not None:
                    column[:start] = old[:start]
        for column, new in zip(self._columns, vars(pixels).values(), strict=True):
            if new is not None:
                column[start : self.size] = new


@dataclass(frozen=True)
class _Cells:
    """Counts of all scores from the lowest to the highest, in cells of scores that share their high bits."""

    dropped: int  # low bits
    first: int  # high bits of the lowest score
    count_CK: Int64[np.ndarray, "c k"]

    @staticmethod
    def empty(lowest: float, highest: float, columns: int) -> "_Cells":
        low, high = (int(code) for code in _ordered(np.array([lowest, highest], dtype=np.float32)))
        dropped = 0
        while (high >> dropped) - (low >> dropped) >= MAX_CELLS:
            dropped += 1
        width = (high >> dropped) - (low >> dropped) + 1
        return _Cells(dropped, low >> dropped, np.zeros((columns, width), dtype=np.int64))

    def over(self, wider: "_Cells") -> "_Cells":
        """The same counts in the cells of a range that may be wider."""
        if (wider.dropped, wider.first, wider.count_CK.shape) == (self.dropped, self.first, self.count_CK.shape):
            return self
        cell_K = (self._high_bits() >> (wider.dropped - self.dropped)) - wider.first
        start_K = _starts(cell_K)
        count_CK = np.zeros(wider.count_CK.shape, dtype=np.int64)
        count_CK[:, cell_K[start_K]] = np.add.reduceat(self.count_CK, start_K, axis=1)
        return replace(wider, count_CK=count_CK)

    def count(self, pixels: _Pixels) -> None:
        """Add pixels, in place."""
        size = len(pixels.score_P) // THREADS + 1
        parts = [pixels.part(slice(thread * size, (thread + 1) * size)) for thread in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            for count_2K in pool.map(self._counted, parts):
                self.count_CK[:2] += count_2K
        if pixels.share_P is not None:
            np.add.at(self.count_CK[2], self._cell(pixels.score_P[pixels.truth_P]), pixels.share_P[pixels.truth_P])

    def _counted(self, pixels: _Pixels) -> Int32[np.ndarray, "2 k"]:
        width = self.count_CK.shape[1]
        code_P = np.empty(len(pixels.score_P), dtype=np.int64)
        for start in range(0, len(code_P), PIXELS_PER_BLOCK):
            block = slice(start, start + PIXELS_PER_BLOCK)
            cell_P = self._cell(pixels.score_P[block])
            # NumPy multiplies bytes five times as fast as booleans.
            cell_P += np.multiply(pixels.truth_P[block].view(np.uint8), np.uint32(width), dtype=np.uint32)
            code_P[block] = cell_P
        # As numpy.bincount, which lets only one thread count at a time.
        count_2K = torch.zeros(2 * width, dtype=torch.int32)
        count_2K.scatter_add_(0, torch.from_numpy(code_P), torch.ones(1, dtype=torch.int32).expand(len(code_P)))
        return count_2K.numpy().reshape(2, width)

    def _cell(self, score_P: Float32[np.ndarray, " p"]) -> UInt32[np.ndarray, " p"]:
        cell_P = _ordered(score_P)  # changed in place, which is twice as fast
        cell_P >>= np.uint32(self.dropped)
        cell_P -= np.uint32(self.first)
        return cell_P

    def scores(self) -> Float32[np.ndarray, " k"]:
        """The lowest score of each cell."""
        return _scores(self._high_bits() << self.dropped)

    def _high_bits(self) -> Int64[np.ndarray, " k"]:
        return np.arange(self.first, self.first + self.count_CK.shape[1])


@dataclass(frozen=True)
class _Table:
    """Counts of the scores that occur in each unit, by ascending code: unit · 2^32 + score as an ordered integer."""

    code_T: Int64[np.ndarray, " t"]
    count_CT: Int64[np.ndarray, "c t"]
    dropped: int  # low bits of the scores, which are 0 in the codes

    def with_units(self, index_U: Int64[np.ndarray, " u"]) -> "_Table":
        """The same counts with unit u renamed to index_U[u]."""
        return _grouped((index_U[self.code_T >> 32] << 32) | (self.code_T & 0xFFFFFFFF), [self.count_CT], self.dropped)

    def starts(self, n_units: int) -> Int64[np.ndarray, " u_and_1"]:
        """The row where each unit starts, and the end of the last; units without pixels have no rows."""
        return np.searchsorted(self.code_T >> 32, np.arange(n_units + 1))

    def truth_2U(self, n_units: int) -> Int64[np.ndarray, "2 u"]:
        """Numbers of normal and anomalous pixels of each unit."""
        sum_2T = np.pad(np.cumsum(self.count_CT[:2], axis=1), [(0, 0), (1, 0)])
        return np.diff(sum_2T[:, self.starts(n_units)], axis=1)


def _tabulated(pixels: _Pixels, dropped: int = 0) -> _Table:
    """Pixels as a table; all of unit 0 where they have no units."""
    code_P = (_ordered(pixels.score_P) >> np.uint32(dropped) << np.uint32(dropped)).astype(np.int64)
    if pixels.unit_P is not None:
        code_P |= pixels.unit_P << 32
    negative_P, positive_P = np.sort(code_P[~pixels.truth_P]), code_P[pixels.truth_P]
    order_P = np.argsort(positive_P)
    positive_P = positive_P[order_P]
    start_N, start_A = _starts(negative_P), _starts(positive_P)
    count_CN = np.zeros((2 if pixels.share_P is None else 3, len(start_N)), dtype=np.int64)
    count_CA = np.zeros((len(count_CN), len(start_A)), dtype=np.int64)
    count_CN[0] = np.diff(start_N, append=len(negative_P))
    count_CA[1] = np.diff(start_A, append=len(positive_P))
    if pixels.share_P is not None and len(start_A):
        count_CA[2] = np.add.reduceat(pixels.share_P[pixels.truth_P][order_P], start_A)
    return _grouped(np.append(negative_P[start_N], positive_P[start_A]), [count_CN, count_CA], dropped)


def _merged(first: _Table | None, second: _Table) -> _Table:
    """The sum of two tables, with as many bits of the scores as keep the number of rows within its bound."""
    tables = [second] if first is None else [first, second]
    code_T = np.concatenate([table.code_T for table in tables])
    dropped = _bits_to_drop(code_T, max(table.dropped for table in tables))
    return _grouped(code_T >> dropped << dropped, [table.count_CT for table in tables], dropped)


def _bits_to_drop(code_T: Int64[np.ndarray, " r"], dropped: int) -> int:
    sorted_T = np.sort(code_T, kind="stable")  # which is quick on sorted runs
    change_T = sorted_T[1:] ^ sorted_T[:-1]
    while np.count_nonzero(change_T >> dropped) >= MAX_ROWS and dropped < MAX_DROPPED_BITS:
        dropped += 1
    return dropped


def _grouped(code_T: Int64[np.ndarray, " r"], counts: list[Int64[np.ndarray, "c _"]], dropped: int) -> _Table:
    """A table of rows in any order, in which codes may repeat; the counts stand one behind the other."""
    order_T = np.argsort(code_T, kind="stable")
    code_T = code_T[order_T]
    start_T = _starts(code_T)
    count_CT = np.zeros((len(counts[0]), len(start_T)), dtype=np.int64)
    if len(start_T):
        for column, count_T in enumerate(count_CT):  # one at a time, to save memory
            count_T[:] = np.add.reduceat(np.concatenate([count_C[column] for count_C in counts])[order_T], start_T)
    return _Table(code_T[start_T], count_CT, dropped)


def _starts(sorted_P: Int64[np.ndarray, " p"]) -> Int64[np.ndarray, " t"]:
    """Where each run of equal numbers starts; none is negative."""
    return np.flatnonzero(np.diff(sorted_P, prepend=-1))


def _ordered(score_P: Float32[np.ndarray, " p"]) -> UInt32[np.ndarray, " p"]:
    """Integers in the order of the scores: the bits, all turned for negative scores, the sign turned for others."""
    bits_P = (score_P + np.float32(0)).view(np.int32)  # -0 becomes 0
    ordered_P = bits_P >> 31  # -1 for negative scores, 0 for others
    ordered_P |= np.int32(-(2**31))
    ordered_P ^= bits_P
    return ordered_P.view(np.uint32)


def _scores(code_K: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, " k"]:
    """The scores of ordered integers, whatever stands above their 32 bits."""
    ordered_K = code_K.astype(np.uint32).view(np.int32)
    return (ordered_K ^ (~(ordered_K >> 31) | np.int32(-(2**31)))).view(np.float32)


def _resampled(
    table: _Table, n_units: int, seed: int, threshold: float | None, resamples: int
) -> list[dict[str, float] | None]:
    """The measures of all units and then of every resample of them; None where it lacks a class."""
    score_K, weight_RU, count_CRK = _resampled_counts(table, n_units, seed, threshold, resamples)
    row_U = table.starts(n_units)
    highest_U = np.where(np.diff(row_U) > 0, _scores(table.code_T)[row_U[1:] - 1], -np.inf)
    drawn = []
    for weight_U, count_CK in zip(weight_RU, count_CRK.swapaxes(0, 1), strict=True):
        if count_CK[0].any() and count_CK[1].any():
            highest = float(highest_U[weight_U > 0].max())
            drawn.append(_numbers(from_counts(score_K, *count_CK, highest=highest, threshold=threshold)))
        else:
            drawn.append(None)
    return drawn


def _resampled_aurocs(table: _Table, n_units: int, seed: int, resamples: int) -> Float64[np.ndarray, " r"]:
    """The AUROC of all units and then of every resample of them; NaN where it lacks a class."""
    _, _, (negative_RK, positive_RK, *_) = _resampled_counts(table, n_units, seed, None, resamples)
    return _auroc_from_counts(negative_RK, positive_RK)


def _resampled_counts(
    table: _Table, n_units: int, seed: int, threshold: float | None, resamples: int
) -> tuple[Float32[np.ndarray, " k"], Float32[np.ndarray, "r u"], Float32[np.ndarray, "c r k"]]:
    """Lowest score of each cell, weights of the units, and counts: of all units, and then of every resample."""
    unit_T, score_T = table.code_T >> 32, _scores(table.code_T)
    cell_T, score_K = _resampling_cells(score_T, table.count_CT[:2], threshold)
    row_U = table.starts(n_units)

    weight_RU = resampled_weights(n_units, resamples, seed)
    width = len(score_K)
    count_CRK = np.zeros((len(table.count_CT), 1 + resamples, width), dtype=np.float32)  # exact up to 2^24 in one cell
    for start in range(0, n_units, UNITS_PER_CHUNK):
        stop = min(start + UNITS_PER_CHUNK, n_units)
        rows = slice(row_U[start], row_U[stop])
        place_T = (unit_T[rows] - start) * width + cell_T[rows]
        for count_RK, count_T in zip(count_CRK, table.count_CT[:, rows], strict=True):
            count_UK = np.bincount(place_T, count_T, minlength=(stop - start) * width)
            count_RK += weight_RU[:, start:stop] @ count_UK.reshape(-1, width).astype(np.float32)
    return score_K, weight_RU, count_CRK


def _resampling_cells(
    score_T: Float32[np.ndarray, " t"], count_2T: Int64[np.ndarray, "2 t"], threshold: float | None
) -> tuple[Int64[np.ndarray, " t"], Float32[np.ndarray, " k"]]:
    """Cell of every row and lowest score of every cell: quantiles of both classes, split at the thresholds of the IoU.

    A score that reaches over a quantile, of the mean of the distributions of both classes, has a cell of its own.
    """
    score_G, group_T = np.unique(score_T, return_inverse=True)
    if len(score_G) <= 2 * RESAMPLING_CELLS:
        return group_T, score_G
    end_G = np.zeros(len(score_G))
    for count_T in count_2T:
        end_G += np.bincount(group_T, count_T).cumsum() / count_T.sum()
    quantile_G = np.floor(np.append(0, end_G) * RESAMPLING_CELLS)
    limits = np.append(GRID * float(score_G[-1]), [] if threshold is None else threshold).astype(np.float32)
    # Each of the three grows with the score, so that their sum changes wherever one of them does.
    sum_G = quantile_G[:-1] + quantile_G[1:] + np.searchsorted(np.sort(limits), score_G, side="right")
    first_G = np.diff(sum_G, prepend=-1) > 0
    return (np.cumsum(first_G) - 1)[group_T], score_G[first_G]


def _unit_names(unit: Shaped[Array, " b"] | Sequence[Unit], images: int) -> Shaped[np.ndarray, " b"]:
    names = as_array(unit) if hasattr(unit, "shape") else np.asarray(unit, dtype=None if len(unit) else int)
    mixed = not hasattr(unit, "shape") and len({isinstance(name, str) for name in unit}) > 1
    if mixed or names.shape != (images,) or names.dtype.kind not in "iuU":
        raise ValueError(
            f"unit must hold one whole number or name per image, got {names.dtype} of shape {names.shape} "
            f"for {images} images."
        )
    return names


def _numbers(metrics: PixelScores) -> dict[str, float]:
    return {name: value for name, value in asdict(metrics).items() if value is not None}


def _difference(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {name: first[name] - second[name] for name in first}


def _intervals(
    value: dict[str, float], drawn: list[dict[str, float] | None], level: float, n: int
) -> dict[str, Interval]:
    """Percentiles of the resamples, less what the cells change in the measures of all units, which come first."""
    in_cells, *drawn = (numbers for numbers in drawn if numbers is not None)
    by_name = {name: np.array([numbers[name] for numbers in drawn]) for name in value}
    return {
        name: percentile_interval(value[name], drawn_R, level, n, value[name] - in_cells[name])
        for name, drawn_R in by_name.items()
    }


def _auroc_interval(value: float, auroc_R: Float64[np.ndarray, " r"], level: float, n: int) -> Interval:
    """As `_intervals`: percentiles of the resamples, less what the cells change in the AUROC of all units."""
    return percentile_interval(value, auroc_R[1:], level, n, value - auroc_R[0])
