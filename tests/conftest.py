from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Public data files (not part of the repository), found through MOEPLAN_DATA."""
    value = os.environ.get("MOEPLAN_DATA")
    if not value or not Path(value).is_dir():
        pytest.skip("MOEPLAN_DATA does not name a directory with the public data files")
    return Path(value)
