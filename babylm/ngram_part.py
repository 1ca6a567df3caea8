"""An n-gram model with interpolated modified Kneser-Ney smoothing."""

import numpy as np


class NgramModel:
    """Interpolated modified Kneser-Ney (Chen & Goodman 1999, section 3.6 and equation 26).

    The highest order counts n-grams; every lower order counts the distinct tokens that an n-gram
    follows (continuation counts). Each order takes a discount D1, D2 or D3+ from counts of 1, 2 and
    3 or more and gives the mass it took to the order below; the last one below is uniform over the
    vocabulary, so no token has probability zero.

    All tables are sorted arrays and all look-ups binary searches: an n-gram is known by its row,
    and its key is (row of its first n-1 tokens) x vocab_size + last token.
    """

    def __init__(self, order: int, vocab_size: int):
        if order < 1 or vocab_size < 1:
            raise ValueError(f"order and vocab_size must be at least 1, not {order}, {vocab_size}")
        self.order = order
        self.vocab_size = vocab_size
        self.levels: list[dict[str, np.ndarray]] = []

    def fit(self, ids: np.ndarray) -> "NgramModel":
        """Count a flat stream of token ids, shape (tokens,); returns the model itself."""
        ids = self._checked(ids)
        if not len(ids):
            raise ValueError("cannot fit an n-gram model on an empty stream")
        orders = range(1, min(self.order, len(ids)) + 1)
        keys, rows, firsts = [], [np.zeros(len(ids), dtype=np.int64)], []
        for n in orders:
            # rows[n][i] is the n-gram that starts at token i.
            last = ids[n - 1 :]
            table, first, row = np.unique(
                rows[-1][: len(last)] * self.vocab_size + last, return_index=True, return_inverse=True
            )
            keys.append(table)
            firsts.append(first)
            rows.append(row.reshape(-1))
        self.levels = []
        for n in orders:
            if n == orders[-1]:
                counts = np.bincount(rows[n], minlength=len(keys[n - 1]))
            else:
                # One for each distinct (n+1)-gram that ends in this n-gram. The n-gram that opens
                # the stream follows nothing and may count 0; its context then backs off further.
                counts = np.bincount(rows[n][firsts[n] + 1], minlength=len(keys[n - 1]))
            self.levels.append(self._level(keys[n - 1], counts))
        return self

    def _level(self, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Discount one order: what each n-gram keeps, and what each context gives away."""
        contexts = keys // self.vocab_size
        discounts = self._discounts(counts)[np.minimum(counts, 3)]
        total = np.bincount(contexts, weights=counts)
        given = np.bincount(contexts, weights=discounts)
        share = 1.0 / np.maximum(total, 1.0)
        return {
            "keys": keys,
            "kept": (counts - discounts) * share[contexts],
            "given": np.where(total > 0, given * share, 1.0),
        }

    @staticmethod
    def _discounts(counts: np.ndarray) -> np.ndarray:
        """(0, D1, D2, D3+) from the counts of counts; absolute discounts where those are empty."""
        n1, n2, n3, n4 = (float((counts == c).sum()) for c in (1, 2, 3, 4))
        if min(n1, n2, n3) == 0:
            return np.array([0.0, 0.75, 0.75, 0.75])
        y = n1 / (n1 + 2 * n2)
        d = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        # Small or artificial texts give estimates outside what the formula assumes.
        return np.clip(d, [0.0, 0.05, 0.05, 0.05], [0.0, 0.95, 1.95, 2.95])

    def logprobs(self, ids: np.ndarray) -> np.ndarray:
        """Log-probability in nats of each token given its up to order-1 predecessors.

        `ids` has shape (tokens,), and so has the result; the first token has its unigram value.
        """
        ids = self._checked(ids)
        if not self.levels:
            raise RuntimeError("fit the model before asking it for log-probabilities")
        probs = np.full(len(ids), 1.0 / self.vocab_size)
        context = np.zeros(len(ids), dtype=np.int64)  # row of the (n-1)-gram before each token, or -1
        for n, level in enumerate(self.levels, start=1):
            known = (context >= 0) & (context < len(level["given"]))
            row, found = self._find(level["keys"], context * self.vocab_size + ids, known)
            given = level["given"][np.where(known, context, 0)]
            kept = np.where(found, level["kept"][row], 0.0)
            probs = np.where(known, kept + given * probs, probs)
            # The n-gram that ends at token i-1 is the context of token i at the next order.
            context = np.full(len(ids), -1, dtype=np.int64)
            context[1:] = np.where(found, row, -1)[:-1]
        return np.log(probs)

    @staticmethod
    def _find(table: np.ndarray, keys: np.ndarray, wanted: np.ndarray):
        """Rows of `keys` in a sorted table, and which of them are there."""
        row = np.minimum(np.searchsorted(table, keys), len(table) - 1)
        return row, wanted & (table[row] == keys)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"token ids must lie in [0, {self.vocab_size})")
        return ids
