"""``moeplan validate peers`` with two peers made for the test, and what it refuses."""

from __future__ import annotations

import json
import os
import stat
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from moeplan.cli import cli
from moeplan.errors import InputError
from moeplan.validation import peers
from moeplan.validation.peers import validate_peers
from moeplan.validation.plots import plot_peers

INFERSIM = """
import argparse, time
class ModelConfig:
    def __init__(self, path):
        self.path = path
class Model:
    def __init__(self, args, config):
        self.args, self.seen = args, config.path
    def print_weights_info(self): print("weights")
    def print_kvcache_info(self): self.target_bs = self.args.decode_bs
    def print_flops_info(self): print("operations")
    def decoding(self):
        time.sleep(0.02)
        print("TPOT (ms):     ", self.target_bs / 2.0)
        print("Throughput (TGS:tok/GPU/s):   ", 1000)
def main(args):
    time.sleep(0.5)
    model = Model(args, ModelConfig(args.config_path))
    model.print_kvcache_info()
    model.decoding()
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("config-path", "device-type", "world-size", "num-nodes", "target-isl", "target-osl"):
        parser.add_argument("--" + name)
    for name in ("use-fp8-gemm", "enable-deepep", "enable-tbo", "decode-only"):
        parser.add_argument("--" + name, action="store_true")
    parser.add_argument("--decode-bs", type=int)
    main(parser.parse_args())
"""
# Requests a second apart, served alone: 256 + 64 tokens take 64 steps of 10 ms.
FRONTIER = """
sleep 2
mkdir -p "$METRICS_OUTPUT_DIR/run"
{
  echo ttft,tpot,request_e2e_time,request_inter_arrival_delay
  for _ in 1 2 3 4; do echo 10,10,640,1; done
} > "$METRICS_OUTPUT_DIR/run/request_metrics.csv"
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(peers, "_COLD", 1)
    monkeypatch.setattr(peers, "_BATCHES", (48, 64, 80))
    cold = peers._cold  # every step of the service is another test's
    monkeypatch.setattr(peers, "_cold", lambda what, *given: {} if what == "played" else cold(what, *given))
    one, two = tmp_path / "InferSim", tmp_path / "Frontier"
    script = two / "examples/architecture/co-location/online/moe_model_basic_online.sh"
    script.parent.mkdir(parents=True)
    one.mkdir()
    (one / "main.py").write_text(INFERSIM)
    script.write_text(FRONTIER)
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    return one, two


def test_times_and_answers_stand_side_by_side(made: tuple[Path, Path], tmp_path: Path) -> None:
    answer = validate_peers(*made)
    figures = {figure["figure"]: figure for figure in answer["figures"]}
    events, point = (peer for peer in answer["peers"])
    # The same requests, a step as long as theirs: the same answers, by another engine.
    assert events["ours"]["ttft_p50_s"] == pytest.approx(0.010)
    assert events["ours"]["e2e_p50_s"] == pytest.approx(events["theirs"]["e2e_p50_s"])
    first = figures["(i) Frontier, events, whole processes"]
    assert first["peer_s"] > 2
    assert first["value"] == pytest.approx(first["ours_s"] / first["peer_s"])
    # Their main waits half a second longer than their decoding; both were asked at every batch.
    theirs = point["theirs"]
    assert theirs["tpot_s"] == 0.032
    assert theirs["prepared_s"]["repeats"] == theirs["anew_s"]["repeats"] == 3
    assert 0.02 < theirs["prepared_s"]["median"] < theirs["anew_s"]["median"]
    assert theirs["anew_s"]["least"] > 0.52
    # Ours: prepared and anew are the same physics; the one interpolates between grid points.
    assert point["ours"]["tpot_prepared_s"] == pytest.approx(point["ours"]["tpot_s"], rel=0.01)
    assert point["ours"]["prepared_s"]["median"] < point["ours"]["anew_s"]["median"]
    last = answer["figures"][-1]
    counted = [figure["value"] for name, figure in figures.items() if name.startswith("(i")]
    assert len(counted) == 2
    assert last["value"] == max(counted)
    assert last["reached"] == answer["reached"] == all(value < 1 for value in counted)
    plot_peers(answer, tmp_path / "peers.svg")
    assert "(ii) InferSim" in ET.parse(tmp_path / "peers.svg").getroot().attrib["aria-label"]


def test_a_peer_that_fails_or_is_missing_is_listed_and_not_reached(made: tuple[Path, Path], tmp_path: Path) -> None:
    (made[0] / "main.py").write_text("raise SystemExit('no tables here')\n")
    answer = validate_peers(made[0], None)
    whys = [peer["theirs"]["why"] for peer in answer["peers"]]
    assert whys[0] == "no checkout given"
    assert "no tables here" in whys[1]
    assert not answer["reached"]
    assert not any(figure["reached"] for figure in answer["figures"])
    assert answer["figures"][-1]["value"] is None
    with pytest.raises(InputError, match="no peer ran"):
        plot_peers(answer, tmp_path / "peers.svg")
    json.dumps(answer, allow_nan=False)


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no peer to run; give --infersim"):
        validate_peers(None, None)
    with pytest.raises(InputError, match=r"has no main.py: it is no checkout"):
        CliRunner().invoke(cli, ["validate", "peers", "--infersim", str(tmp_path)], catch_exceptions=False)
    (tmp_path / "main.py").write_text("")
    with pytest.raises(InputError, match="cannot run"):
        validate_peers(tmp_path, None, infersim_python=os.fspath(tmp_path / "python"))


def test_the_operating_point_is_that_of_the_service() -> None:
    scenario = peers.service_scenario()
    assert scenario.serving is not None
    requests = scenario.serving.requests
    assert requests.concurrency == 128 * 128
    assert np.mean(4543 + np.arange(893)) == peers._CONTEXT
