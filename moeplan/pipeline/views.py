"""What the terminal shows of simulations; of plans see :mod:`moeplan.pipeline.show`."""

from __future__ import annotations

from moeplan.reports.sweep_terminal import sweep_view

__all__ = ["sweep_view"]
