"""The plugins of docs/guides/plugins.md, run as they stand there."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "plugins.md"


def test_plugins_of_the_guide_keep_their_contracts(tmp_path: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL):
        name = code.partition("\n")[0].removeprefix("# ")
        (tmp_path / name).write_text(code, encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    assert re.search(r"\b[1-9]\d+ passed", ran.stdout)


def test_groups_and_classes_of_the_guide_are_there() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for group, *classes in re.findall(r"^\| `(moeplan\.\w+)` \| `([\w.]+)` \| `([\w.]+)` \|$", text, re.MULTILINE):
        assert entry_points(group=group)
        for path in classes:
            module, _, name = path.rpartition(".")
            assert isinstance(getattr(importlib.import_module(module), name), type)
    toml = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert toml is not None
    assert all(entry_points(group=group) for group in tomllib.loads(toml[1])["project"]["entry-points"])
