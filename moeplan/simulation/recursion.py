"""Servers without an engine: the recursion of Kiefer and Wolfowitz (1955) for ``k`` servers and one queue."""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["first_come_first_served"]


@njit(cache=True, nogil=True)
def first_come_first_served(arrival_s, service_s, servers):
    """Start of service of each request, in order of arrival."""
    free = np.zeros(servers)
    start = np.empty(len(arrival_s))
    for q in range(len(arrival_s)):
        server = np.argmin(free)
        start[q] = max(arrival_s[q], free[server])
        free[server] = start[q] + service_s[q]
    return start
