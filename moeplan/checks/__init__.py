"""Does a bundle of inputs make sense?"""

from moeplan.checks.bundle import Bundle, layers_by_position, run_checks
from moeplan.checks.findings import Finding, require

__all__ = ["Bundle", "Finding", "layers_by_position", "require", "run_checks"]
