"""Which drafts are accepted: drawn for each request and step, from a stream of the request's own.

Of mean accept length ``a`` alone every draft whose predecessors were accepted is as likely, ``p``, with
``1 + p + p^2 + ... + p^d = a`` (Leviathan et al., ICML 2023, equation 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from moeplan.specs.serving import SpeculativeSpec

__all__ = ["Acceptance", "acceptance_rates"]

Ints = NDArray[np.int64]


def acceptance_rates(spec: SpeculativeSpec) -> NDArray[np.float64]:
    """Part of the steps in which each of the ``d`` drafts is accepted, ``[d]``."""
    if spec.acceptance_rates is not None:
        return np.array(spec.acceptance_rates)
    places = np.arange(1, spec.num_speculative_tokens + 1)
    likely: float = brentq(lambda p: 1 + (p**places).sum() - (spec.accept_length or 1.0), 0.0, 1.0)
    return np.asarray(likely**places)


class Acceptance:
    """Draws of one run; ``longest`` answer in tokens, the most steps a request takes."""

    def __init__(self, spec: SpeculativeSpec, seed: int, longest: int) -> None:
        self._rates, self._seed, self.longest = acceptance_rates(spec), seed, longest

    def tokens_after(self, request: int, generated: int, left: int) -> Ints:
        """Further tokens of a request with ``generated`` ones after 0, 1, 2, ... steps, up to the ``left`` ones it was
        asked for: what the last step brings beyond them is dropped."""
        rng = np.random.default_rng([self._seed, 13, request, generated])
        drawn = rng.random(left)  # a step brings one token or more
        total = np.cumsum(1 + (drawn[:, None] < self._rates).sum(1))
        steps = int(np.searchsorted(total, left)) + 1
        return np.concatenate([[0], np.minimum(total[:steps], left)])
