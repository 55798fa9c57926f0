from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from moeplan.cli import cli
from moeplan.errors import UnknownNameError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_models_are_listed():
    listed = json.loads(run("models", "--json"))["models"]
    v3 = next(entry for entry in listed if entry["name"] == "deepseek-v3")
    assert (v3["moe_layers"], v3["experts"], v3["top_k"], v3["kv_bytes_per_token"]) == (58, 256, 8, 70272)
    assert "deepseek-ai/DeepSeek-R1" in v3["aliases"]
    row = next(line for line in run("models").splitlines() if line.startswith("mixtral-8x7b "))
    assert row.split()[:6] == ["mixtral-8x7b", "32", "8", "2", "0", "46.7"]


def test_one_model_is_shown():
    shown = json.loads(run("models", "llama-4-maverick", "--json"))
    assert shown["moe_layer_ids"] == list(range(1, 48, 2))
    assert shown["parameters"] == pytest.approx(400e9, rel=0.01)
    text = run("models", "llama-4-maverick")
    assert "1..47 in steps of 2" in text
    with pytest.raises(UnknownNameError, match="did you mean 'dbrx'"):
        run("models", "dbrxx")


def test_clusters_are_listed():
    listed = {entry["name"]: entry for entry in json.loads(run("clusters", "--json"))["clusters"]}
    assert (listed["gb200-nvl72"]["nodes"], listed["gb200-nvl72"]["ranks_per_node"]) == (18, 4)
    assert listed["h100-sxm-80gb"]["memory"] == "79.6 GiB"
    row = next(line for line in run("clusters").splitlines() if line.startswith("h100-sxm-80gb"))
    assert "450 GB/s in 8" in row


def test_one_cluster_is_shown_with_its_routes():
    shown = json.loads(run("clusters", "h100", "--nodes", "2", "--ranks-per-node", "4", "--json"))
    assert (shown["num_ranks"], shown["scale_up_domains"]) == (8, 2)
    inside, outside = shown["routes"]
    assert (inside["pairs"], inside["bandwidth_bytes_per_s"]) == (8 * 3, 450e9)
    assert (outside["pairs"], outside["bandwidth_bytes_per_s"]) == (8 * 4, 50e9)
    assert outside["example"] == ["rank0", "nic0", "spine", "nic4", "rank4"]
    assert "50 GB/s, 8 us, 32 pairs" in run("clusters", "h100", "--nodes", "2", "--ranks-per-node", "4")


def test_a_size_without_a_name_is_a_usage_error():
    result = CliRunner().invoke(cli, ["clusters", "--nodes", "2"])
    assert result.exit_code == 2
    assert "--nodes and --ranks-per-node size a cluster; name one" in result.stderr


def test_help_has_an_example():
    assert "moeplan models deepseek-v3" in run("models", "--help")
    assert "moeplan clusters h100-sxm --nodes 4" in run("clusters", "--help")


@pytest.mark.parametrize("width", [60, 80, 130])
def test_lists_in_a_terminal_leave_out_whole_columns(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr("moeplan.cli.catalogue.sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setenv("COLUMNS", str(width))
    text = run("clusters")
    row = next(line for line in text.splitlines() if line.startswith("h100-sxm-80gb "))
    assert "79.6 GiB" in row and "989 TFLOPS" in row  # noqa: PT018
    assert ("two-level" in row, "in wider terminals" in text) == (width == 130, width < 130)
