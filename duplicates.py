"""Texts that are equal or nearly so: MinHash signatures in bands, then exact Jaccard similarity.

Broder 1997, "On the resemblance and containment of documents"; bands as in Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", section 3.4. However alike the texts are, the work is linear:
in each band a text is compared with two others at most, and with none that it is linked to already.

Shapes: N texts, D different ones, P pairs of texts, G n-grams of all texts concerned.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from data import normalised

# Bytes of UTF-8 in an n-gram: five Latin letters, half as many Arabic ones, nearly two Chinese
# characters, so that a word changed costs about the same in every script.
GRAM = 5
SIMILAR = 0.6  # Jaccard similarity of two texts' sets of n-grams from which on they nearly equal
BANDS, ROWS = 16, 4  # one band at least agrees in 89 % of pairs at 0.6, 99 % at 0.7, 99.98 % at 0.8
MARGIN = 0.15  # below SIMILAR that a signature's estimate may be: 2.5 standard deviations
KEPT = 2048  # bytes of a text's beginning and of its end that are looked at
CHUNK = 1 << 18  # n-grams at a time
PAIR = np.uint64(8 * GRAM + 1)  # bits below a pair's number, with an n-gram's and its side's
# Blanks and punctuation do not make another text.
UNSEEN = dict.fromkeys(
    c for c in range(0x10000) if unicodedata.category(chr(c)).startswith(("P", "Z", "Cc", "Cf"))
)


@dataclass(frozen=True)
class Alike:
    """Which of N texts are alike: those with the same number in `same`, and in `near`, are.

    same (N,) int64: equal as `data.normalised` has them. near (N,) int64: linked by pairs at least
    SIMILAR, directly or over others (single linkage); equal texts are near each other, too.
    comparisons: pairs that were looked at.
    """

    same: np.ndarray
    near: np.ndarray
    comparisons: int


def alike(texts: Iterable[str]) -> Alike:
    """Compare all texts; the same result for the same texts in the same order."""
    digests, stored, ends = bytearray(), bytearray(), [0]
    for text in texts:
        form = normalised(text)
        digests += hashlib.blake2b(form.encode(), digest_size=8).digest()
        letters = form.translate(UNSEEN).encode()
        stored += letters if len(letters) <= 2 * KEPT else letters[:KEPT] + letters[-KEPT:]
        ends.append(len(stored))
    _, first, same = np.unique(
        np.frombuffer(digests, np.uint64), return_index=True, return_inverse=True
    )
    offsets = np.array(ends)
    counts = np.maximum(np.diff(offsets)[first] - GRAM + 1, 0)
    grams = Grams(np.frombuffer(stored, np.uint8), offsets[first], counts)
    near, comparisons = _linked(grams)
    return Alike(same, near[same], comparisons)


@dataclass(frozen=True)
class Grams:
    """The n-grams of D texts: `counts` (D,) of them from each place `starts` (D,) of `stored`."""

    stored: np.ndarray  # uint8
    starts: np.ndarray
    counts: np.ndarray

    def of(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes (G,) uint64 below 2 ** 40, and the place in `texts` that each is of, (G,)."""
        counts = self.counts[texts]
        where = np.repeat(np.arange(len(texts)), counts)
        at = np.arange(len(where)) + (self.starts[texts] - np.cumsum(counts) + counts)[where]
        codes = np.zeros(len(at), dtype=np.uint64)
        for i in range(GRAM):
            codes = codes << np.uint64(8) | self.stored[at + i]
        return codes, where

    def chunks(self, sizes: np.ndarray) -> Iterator[slice]:
        """Slices of things in a row, each about CHUNK n-grams; sizes: their n-grams."""
        total = np.cumsum(sizes)
        start = 0
        while start < len(sizes):
            limit = (total[start - 1] if start else 0) + CHUNK
            end = max(start + 1, int(np.searchsorted(total, limit, side="right")))
            yield slice(start, end)
            start = end

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The exact Jaccard similarity of texts a and b, (P,), which have n-grams."""
        result = np.zeros(len(a))
        for part in self.chunks(self.counts[a] + self.counts[b]):
            sides = []
            for side, texts in enumerate((a[part], b[part])):
                codes, where = self.of(texts)
                pair = where.astype(np.uint64) << PAIR
                sides.append(pair | codes << np.uint64(1) | np.uint64(side))
            codes = np.sort(np.concatenate(sides))  # by pair, then n-gram, then side
            codes = codes[np.flatnonzero(np.diff(codes, prepend=~codes[:1]))]
            joint = codes[1:][np.diff(codes >> np.uint64(1)) == 0]
            size, shared = (
                np.bincount((c >> PAIR).astype(np.int64), minlength=len(a[part]))
                for c in (codes, joint)
            )
            result[part] = shared / (size - shared)
        return result


def _signatures(grams: Grams) -> tuple[np.ndarray, np.ndarray]:
    """A key for each band, (D, BANDS) uint32, and a byte of each minimum, (D, BANDS * ROWS)."""
    rng = np.random.default_rng(1997)
    multipliers, addends = rng.integers(1 << 32, size=(2, BANDS * ROWS), dtype=np.uint32) | 1
    mix = rng.integers(1 << 63, size=ROWS, dtype=np.uint64) | np.uint64(1)
    keys = np.zeros((len(grams.counts), BANDS), dtype=np.uint32)
    low = np.zeros((len(grams.counts), BANDS * ROWS), dtype=np.uint8)
    some = np.flatnonzero(grams.counts)
    for part in grams.chunks(grams.counts[some]):
        texts = some[part]
        codes, _ = grams.of(texts)
        firsts = np.cumsum(grams.counts[texts]) - grams.counts[texts]
        codes = (codes * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)).astype(np.uint32)
        minima = np.empty((BANDS * ROWS, len(texts)), dtype=np.uint32)
        hashed = np.empty_like(codes)
        for i in range(BANDS * ROWS):
            np.multiply(codes, multipliers[i], out=hashed)
            np.add(hashed, addends[i], out=hashed)
            np.minimum.reduceat(hashed, firsts, out=minima[i])
        low[texts] = (minima >> np.uint32(8)).T
        banded = (minima.reshape(BANDS, ROWS, -1) * mix[:, None]).sum(axis=1)  # modulo 2 ** 64
        keys[texts] = (banded >> np.uint64(32)).T
    return keys, low


def _linked(grams: Grams) -> tuple[np.ndarray, int]:
    """A cluster's number for each text, (D,), and how many pairs were compared."""
    keys, low = _signatures(grams)
    some = np.flatnonzero(grams.counts)
    clusters, comparisons = np.arange(len(keys)), 0
    edges = np.zeros((2, 0), dtype=np.int64)
    for band in keys.T:
        order = some[np.argsort(band[some], kind="stable")]
        for pairs in _candidates(order, band[order]):
            pairs = pairs[:, np.not_equal(*clusters[pairs])]
            comparisons += pairs.shape[1]
            likely = [
                (low[a] == low[b]).mean(axis=1) >= SIMILAR - MARGIN
                for a, b in (pairs[:, i : i + CHUNK] for i in range(0, pairs.shape[1], CHUNK))
            ]
            pairs = pairs[:, np.concatenate([np.zeros(0, dtype=bool), *likely])]
            is_near = grams.similarity(*pairs) >= SIMILAR
            edges = np.concatenate([edges, pairs[:, is_near]], axis=1)
            graph = coo_matrix((np.ones(edges.shape[1]), edges), shape=(len(keys), len(keys)))
            clusters = connected_components(graph, directed=False)[1]
    return clusters, comparisons


def _candidates(order: np.ndarray, keys: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs (2, P) of texts with one key: each with the one before it, then with the first.

    order: the texts, sorted by key; keys: theirs.
    """
    places = np.arange(len(order))
    is_new = np.diff(keys, prepend=~keys[:1]) != 0
    first = np.maximum.accumulate(np.where(is_new, places, 0))
    for distance, other in ((1, places - 1), (2, first)):
        later = np.flatnonzero(places - first >= distance)
        yield np.stack([order[other[later]], order[later]])
