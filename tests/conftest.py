from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A shell without job control starts what runs in the background deaf to Ctrl-C, and all that this starts in turn.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("any machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Public data files (not part of the repository), found through MOEPLAN_DATA."""
    value = os.environ.get("MOEPLAN_DATA")
    if not value or not Path(value).is_dir():
        pytest.skip("MOEPLAN_DATA does not name a directory with the public data files")
    return Path(value)
