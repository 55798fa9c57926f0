"""What the terminal shows of scores and simulations; of plans see :mod:`moeplan.pipeline.show`."""

from __future__ import annotations

from moeplan.reports.run_terminal import comparison_view, result_view
from moeplan.reports.run_words import brief_notes
from moeplan.reports.score_terminal import score_view, scores_view
from moeplan.reports.sweep_terminal import sweep_view

__all__ = ["brief_notes", "comparison_view", "result_view", "score_view", "scores_view", "sweep_view"]
