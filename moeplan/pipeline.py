"""The corridor: one function per job, each the whole way from inputs to results.

The only module that knows two workshops at once; the command line calls nothing else.
"""

from __future__ import annotations

__all__: list[str] = []
