from __future__ import annotations

import errno
import hashlib
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moeplan import files
from moeplan.errors import InputError, SpecError

PLAN = ("a plan", ("plan.json", "*.html"))


def test_a_path_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "plan.json"
    files.write_text(target, "old")

    def fail_half_way():
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["plan.json"]


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    files.write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_nothing_that_is_the_process_s_is_changed_to_write(tmp_path, monkeypatch):
    """The umask: other threads that write in between would get it too."""
    monkeypatch.setattr("os.umask", lambda mask: pytest.fail("all threads have one umask"))
    files.write_text(tmp_path / "a", "x")
    (tmp_path / "other").mkdir()
    with files.atomic_directory(tmp_path / "out", *PLAN):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_directory_takes_the_place_of_the_old_one_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("plan.json", "stale.html"):
        (out / name).write_text("old")
    with files.atomic_directory(out, *PLAN) as temporary:
        (temporary / "plan.json").write_text("new")
        assert (out / "stale.html").exists()
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("plan.json", "new")]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_somebody_elses_in_a_directory_stays(tmp_path):
    out = tmp_path / "out"
    (out / "photos").mkdir(parents=True)
    (out / "photos" / "1.png").write_text("mine")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SpecError, match=r"out\) exists and does not hold a plan; choose another"):
        files.atomic_directory(out, *PLAN).__enter__()
    (out / "plan.json").write_text("old")
    with files.atomic_directory(out, *PLAN) as temporary:
        (temporary / "plan.json").write_text("new")
    found = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"out/plan.json": "new", "out/notes.txt": "mine", "out/photos/1.png": "mine"}


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    out = tmp_path / "out"
    out.symlink_to("disk")
    with files.atomic_directory(out, *PLAN) as temporary:
        (temporary / "plan.json").write_text("new")
    assert out.is_symlink()
    assert (tmp_path / "disk" / "plan.json").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out"]


@pytest.mark.parametrize("name", ["", "."])
def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=r"--out \(\.\) is the current directory"):
        files.require_place(Path(name), *PLAN)


@pytest.mark.parametrize(("name", "text"), [("x.yaml", "seed: {}"), ("x.json", '{{"seed": {}}}')])
def test_numbers_of_thousands_of_digits_are_refused_in_one_line(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text.format("9" * 6000))
    read = files.read_json if name.endswith("json") else files.read_yaml
    with pytest.raises(InputError, match=r"x\.\w+ is not usable (YAML|JSON): .*4300 digits[^;\n]*$"):
        read(path)


def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"seed": 1}', encoding="utf-8-sig")
    assert files.read_json(path) == {"seed": 1}


def test_what_is_read_is_not_written_over(tmp_path):
    path, link = tmp_path / "plan.json", tmp_path / "link.json"
    path.write_text("{}")
    link.symlink_to(path)
    for out in (path, link):
        with pytest.raises(SpecError, match=r"\.json is read and would be written over; name another file to write"):
            files.require_other(out, None, path)
    files.require_other(tmp_path / "new.json", path)


def test_a_place_in_a_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes.txt is a file, not a directory; choose another --out"):
        files.require_place(tmp_path / "notes.txt" / "new" / "plan", *PLAN)
    assert files.require_place(tmp_path / "new" / "plan", *PLAN) == (tmp_path / "new" / "plan").resolve()


def test_a_swap_that_is_interrupted_puts_the_old_directory_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.json").write_text("old")
    rename = Path.rename

    def interrupted(path, target):
        if target == out and not path.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), files.atomic_directory(out, *PLAN):
        pass
    assert {p.name: p.read_text() for p in out.iterdir()} == {"plan.json": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_directory_is_left_alone_when_the_block_fails(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.json").write_text("old")

    def interrupt():
        with files.atomic_directory(out, *PLAN) as temporary:
            (temporary / "plan.json").write_text("new")
            raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        interrupt()
    assert [p.read_text() for p in out.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_of_the_place_asked_for(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)

    def write():
        with files.atomic_directory(tmp_path / "out", *PLAN) as temporary:
            files.write_text(temporary / "plan.json", "{}")

    with pytest.raises(InputError) as raised:
        write()
    assert str(raised.value) == f"cannot write {tmp_path / 'out'}: No space left on device; choose another place"


TOLD_TO_END = """
import os, signal, sys
from pathlib import Path
from moeplan import files
with files.atomic_directory(Path(sys.argv[1]), "a plan", ("plan.json",)) as temporary:
    with files.atomic_path(temporary / "plan.json"):
        os.kill(os.getpid(), signal.SIGTERM)
"""


def test_what_is_told_to_end_while_it_writes_leaves_nothing(tmp_path):
    found = subprocess.run([sys.executable, "-c", TOLD_TO_END, str(tmp_path / "out")], capture_output=True, check=False)
    assert (found.returncode, found.stderr) == (143, b"")
    assert list(tmp_path.iterdir()) == []
    before = signal.getsignal(signal.SIGTERM)
    files.write_text(tmp_path / "a", "x")
    assert signal.getsignal(signal.SIGTERM) == before


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*below: .*choose another place"):
        files.write_text(tmp_path / "file" / "below", "x")
    blocked = files.atomic_directory(tmp_path / "file", *PLAN)
    with pytest.raises(InputError, match=r"cannot write .*file: it is a file, not a directory"):
        blocked.__enter__()


def test_a_directory_that_cannot_be_replaced_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text("old")
    for name, answer, why in (("is_mount", True, "it is a mount point"), ("access", False, "it is read-only")):
        with monkeypatch.context() as patch:
            patch.setattr(Path if name == "is_mount" else files.os, name, lambda *_, answer=answer: answer)
            with pytest.raises(InputError, match=f"cannot write .*: {why}.*; choose another --out"):
                files.require_place(tmp_path, *PLAN)


def test_lines_are_read_and_long_ones_refused(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"1234567\n12345678\nlast")
    lines = files.read_lines(path, max_bytes=8)
    assert next(lines) == b"1234567\n"
    with pytest.raises(InputError, match=r"line 2 is longer than 8 bytes"):
        next(lines)
    assert list(files.read_lines(path, max_bytes=9)) == [b"1234567\n", b"12345678\n", b"last"]
    with pytest.raises(InputError, match=r"cannot read .*absent: No such file"):
        list(files.read_lines(tmp_path / "absent"))


def test_documents_beyond_the_limit_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "a.json").write_text("[1, 2, 3, 4]")
    with pytest.raises(InputError, match="has 12 bytes, more than the 10 a JSON or YAML document may have"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: &a [1]\nb: *a\n",
            r"aliases \(\*name\) are not accepted; write the value out at line 2 column 4",
        ),
        ("a: 1\nb: 2\na: 3\n", r"key 'a' appears twice at line 3 column 1"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            r"is not usable YAML: could not determine a constructor",
        ),
        ("a: [1\n", r"is not usable YAML"),
        ("[" * 5000, r"is nested too deeply to be a document of this project"),
        ("? [1]\n: 2\n", r"is not usable YAML"),
    ],
    ids=["alias", "twice", "tag", "cut", "deep", "key"],
)
def test_yaml_that_is_not_plain_is_refused(tmp_path, text, message):
    path = tmp_path / "scenario.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        files.read_yaml(path)


def test_a_yaml_alias_bomb_stops_at_its_first_alias(tmp_path):
    path = tmp_path / "bomb.yaml"
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    path.write_text("\n".join(["l0: &l0 [x]", *levels]))
    with pytest.raises(InputError, match=r"aliases .* are not accepted; write the value out at line 2"):
        files.read_yaml(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,}', r"is not valid JSON: .* at line 1 column"),
        (b"[" * 100_000, r"nested too deeply"),
        (b"\xff\xfe", r"it is not UTF-8 text \(byte 0\)"),
        (b"", r"is not valid JSON"),
        (b'{"a": 1, "a": 2}', r"key 'a' appears twice"),
    ],
    ids=["comma", "deep", "binary", "empty", "twice"],
)
def test_json_that_is_not_readable_is_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        files.read_json(path)


def test_hashes_are_of_the_bytes_and_json_has_one_form(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert (
        files.sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest() == files.sha256_bytes(b"abc")
    )
    assert files.canonical_json({"b": [1, 2.5], "a": None}) == '{"a":null,"b":[1,2.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical_json(float("nan"))
