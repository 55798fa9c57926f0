from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import moeplan.errors
from moeplan.cli import main
from moeplan.routing.io import read_trace
from moeplan.routing.statistics import describe

DEMO = Path(moeplan.errors.__file__).parent / "data" / "demo_trace.npz"


def run(capsys, monkeypatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["moeplan", "trace", *map(str, words)])
    with pytest.raises(SystemExit, match=r"^\d+$") as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_inspect_prints_a_table_and_draws(capsys, monkeypatch, tmp_path):
    code, out, _ = run(capsys, monkeypatch, "inspect", DEMO, "--out", tmp_path / "pictures")
    assert code == 0
    assert "2,400 tokens" in out
    assert "load cosine" in out
    drawn = {p.name: p.read_text() for p in (tmp_path / "pictures").iterdir()}
    assert sorted(drawn) == ["coactivation.svg", "dependency.svg", "drift.svg", "skew.svg"]
    assert all("</svg>" in text for text in drawn.values())
    run(capsys, monkeypatch, "inspect", DEMO, "--out", tmp_path / "again", "--quiet")
    assert {p.name: p.read_text() for p in (tmp_path / "again").iterdir()} == drawn
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    code, _, err = run(capsys, monkeypatch, "inspect", DEMO, "--out", tmp_path / "mine", "--quiet")
    assert (code, "does not hold pictures of a trace" in err) == (2, True)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_more_than_memory_holds_is_one_error(capsys, monkeypatch, tmp_path):
    code, out, err = run(capsys, monkeypatch, "synth", "--tokens", 10**14, "--out", tmp_path / "made.npz")
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    assert err.startswith("error: Unable to allocate")
    assert err.endswith("; ask for less: fewer tokens, requests, seeds or ranks\n")


def test_inspect_json_is_one_object(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "inspect", DEMO, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["windows"] == ["chat", "code"]
    assert len(found["mutual_information_bits"]) == 25
    assert found["origin"]["synthetic"] is True


def test_many_windows_are_told_by_how_far_apart_they_stand(capsys, monkeypatch, tmp_path):
    turn = np.linspace(0, np.pi / 4, 17)  # windows that turn from one expert to the other by equal angles
    np.save(tmp_path / "counts.npy", np.round(1e6 * np.stack([np.cos(turn), np.sin(turn)], 1))[:, None])
    code, out, _ = run(capsys, monkeypatch, "inspect", tmp_path / "counts.npy")
    assert code == 0
    rows = {line[:18].strip(): line[18:].split() for line in out[out.index("load cosine") :].splitlines()[1:-1]}
    names = {"neighbours": 1, "2 windows apart": 2, "4 windows apart": 4, "8 windows apart": 8, "first and last": 16}
    assert rows == {name: [str(17 - n), *[f"{np.cos(turn[n]):.2f}"] * 3] for name, n in names.items()}
    assert out.splitlines()[-1] == "least alike: window 0 and window 16, 0.71; all pairs are in --json"
    assert max(map(len, out.splitlines())) <= 80
    _, out, _ = run(capsys, monkeypatch, "inspect", tmp_path / "counts.npy", "--json")
    assert np.shape(json.loads(out)["cosine_between_windows"]) == (17, 17)


def test_inspect_counts(capsys, monkeypatch, tmp_path):
    np.save(tmp_path / "counts.npy", np.arange(1, 25.0).reshape(2, 12))
    code, out, _ = run(capsys, monkeypatch, "inspect", tmp_path / "counts.npy", "--out", tmp_path / "p")
    assert code == 0
    assert "counts only" in out
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["drift.svg", "skew.svg"]


def test_the_demo_trace_is_what_its_readme_says(capsys, monkeypatch, tmp_path):
    readme = (DEMO.parent / "README.md").read_text().replace("\\\n", " ")
    (command,) = [line for line in readme.splitlines() if line.strip().startswith("moeplan trace synth")]
    words = command.split()[2:-1]
    assert words[-1] == "--out"
    code, _, _ = run(capsys, monkeypatch, *words, tmp_path / "demo.npz", "--quiet")
    assert code == 0
    again, demo = read_trace(tmp_path / "demo.npz"), read_trace(DEMO)
    assert again.domains == demo.domains
    assert again.layer_ids == tuple(range(1, 27))
    # another processor may round the fit differently, so not the same ids but the same statistics
    mine, theirs = describe(again), describe(demo)
    np.testing.assert_allclose(mine.mutual_information_M, theirs.mutual_information_M, rtol=0.1)
    np.testing.assert_allclose(mine.max_over_mean_L, theirs.max_over_mean_L, rtol=0.1)
    np.testing.assert_allclose(mine.cosine_WW, theirs.cosine_WW, atol=0.03)


def test_the_same_seed_makes_the_same_bytes(capsys, monkeypatch, tmp_path):
    options = (
        "--tokens",
        300,
        "--layers",
        2,
        "--experts",
        16,
        "--top-k",
        2,
        "--dependency",
        0.4,
        "--seed",
        9,
    )
    for name in ("a.npz", "b.npz"):
        run(capsys, monkeypatch, "synth", *options, "--out", tmp_path / name, "--quiet")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_convert_there_and_back(capsys, monkeypatch, tmp_path):
    code, out, _ = run(capsys, monkeypatch, "convert", DEMO, tmp_path / "t.parquet", "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 2400
    run(
        capsys,
        monkeypatch,
        "convert",
        tmp_path / "t.parquet",
        tmp_path / "t.npz",
        "--domain",
        "code",
        "--quiet",
    )
    code_part = read_trace(DEMO, domain="code")
    np.testing.assert_array_equal(read_trace(tmp_path / "t.npz").experts_TLK, code_part.experts_TLK)


def test_convert_refuses_counts_and_other_suffixes(capsys, monkeypatch, tmp_path):
    np.save(tmp_path / "counts.npy", np.ones((2, 4)))
    code, _, err = run(capsys, monkeypatch, "convert", tmp_path / "counts.npy", tmp_path / "t.npz")
    assert (code, "counts only" in err) == (2, True)
    code, _, err = run(capsys, monkeypatch, "convert", DEMO, tmp_path / "t.txt")
    assert (code, "must be .npz or .parquet" in err) == (2, True)
    assert not (tmp_path / "t.txt").exists()


def test_validate_says_so_with_its_exit_code(capsys, monkeypatch, tmp_path):
    code, out, _ = run(capsys, monkeypatch, "validate", DEMO)
    assert (code, out) == (0, "0 errors, 0 warnings\n")
    ids = read_trace(DEMO).experts_TLK.copy()
    np.savez(tmp_path / "few.npz", experts=ids[:50], num_experts=64)
    code, out, _ = run(capsys, monkeypatch, "validate", tmp_path / "few.npz", "--json")
    assert code == 0
    assert [f["code"] for f in json.loads(out)["findings"]] == ["few-tokens"]
    ids[:, 5] = ids[:, 4]
    np.savez(tmp_path / "bad.npz", experts=ids, num_experts=64)
    code, out, _ = run(capsys, monkeypatch, "validate", tmp_path / "bad.npz", "--json")
    assert code == 2
    assert json.loads(out)["valid"] is False


def test_the_first_example_of_synth_runs(capsys, monkeypatch, tmp_path):
    _, out, _ = run(capsys, monkeypatch, "synth", "--help")
    example = re.search(r"Examples:\n +moeplan trace (synth .*?\.npz)", out, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, monkeypatch, *example[1].replace("\\\n", " ").split(), "--tokens", 2048)
    assert (code, err) == (0, "")
    assert list(read_trace(tmp_path / "synthetic.npz").domains) == ["chat", "code"]


def test_synth_like_a_trace(capsys, monkeypatch, tmp_path):
    np.savez(tmp_path / "part.npz", experts=read_trace(DEMO).experts_TLK[:1000, :3], num_experts=64)
    words = ("synth", "--like", tmp_path / "part.npz", "--seed", 4, "--out", tmp_path / "l.npz")
    code, out, _ = run(capsys, monkeypatch, *words, "--json")
    made = json.loads(out)
    assert code == 0
    assert (made["tokens"], len(made["layer_ids"]), made["num_experts"]) == (1000, 3, 64)
    for option, value in (("hot", 9), ("layers", 2), ("model", "deepseek-v2-lite"), ("drift-cosine", 0.9)):
        code, _, err = run(capsys, monkeypatch, *words, f"--{option}", value)
        assert (code, f"--like and {option.replace('-', '_')} both say what to make" in err) == (2, True)


def test_synth_like_a_trace_has_its_phases(capsys, monkeypatch, tmp_path):
    shape = ("--tokens", 600, "--layers", 2, "--experts", 16, "--top-k", 2, "--phase", "decode")
    run(capsys, monkeypatch, "synth", *shape, "--out", tmp_path / "decode.npz")
    for options, phases in (((), {1}), (("--phase", "mix"), {0, 1}), (("--phase", "prefill"), {0})):
        run(capsys, monkeypatch, "synth", "--like", tmp_path / "decode.npz", *options, "--out", tmp_path / "like.npz")
        assert set(read_trace(tmp_path / "like.npz").phase_T) == phases


def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path):
    (tmp_path / "t.npz").write_bytes(b"PK")
    for words in (
        ("inspect", tmp_path / "t.npz"),
        ("validate", tmp_path / "no.npz"),
        ("inspect", DEMO, "--windows", "x"),
    ):
        code, out, err = run(capsys, monkeypatch, *words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
