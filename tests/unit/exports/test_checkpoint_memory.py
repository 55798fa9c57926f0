"""Permuting a checkpoint takes no more memory than a part of one layer, however many layers there are."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are read with torch")

from safetensors.torch import save_file

LAYERS, EXPERTS, EXPERT_BYTES = 16, 8, 2**18
LAYER_BYTES = EXPERTS * EXPERT_BYTES * 2  # numbered and fused

# Private memory (RssAnon) is sampled: pages of mapped files are the kernel's to drop.
PERMUTE = """
import json, sys, threading, time
from pathlib import Path
import numpy as np
from moeplan.exports.checkpoint import permute_checkpoint
source, out = Path(sys.argv[3]), Path(sys.argv[4])
if source.suffix == ".pt":
    import torch
    torch.save(torch.zeros(3), out.with_suffix(".warm"))
    torch.load(out.with_suffix(".warm"), mmap=True)
def private():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
layers, experts = int(sys.argv[1]), int(sys.argv[2])
orders = {i: np.roll(np.arange(experts, dtype=np.int32), 1) for i in range(layers)}
before, peak, done = private(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
permute_checkpoint(source, out, orders, experts, "{}", lambda what, part: None)
done = True
thread.join()
print(json.dumps({"growth": peak - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_memory_stays_below_one_layer(suffix, tmp_path):
    source, out = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    state = {}
    block = torch.arange(EXPERTS, dtype=torch.uint8)[:, None].expand(EXPERTS, EXPERT_BYTES)
    for i in range(LAYERS):
        state[f"model.layers.{i}.mlp.gate.weight"] = torch.arange(EXPERTS * 4.0).reshape(EXPERTS, 4)
        state[f"model.layers.{i}.mlp.experts.gate_up_proj"] = block.contiguous()
        for e in range(EXPERTS):
            state[f"model.layers.{i}.mlp.experts.{e}.w1"] = block[e].clone()
    (save_file if suffix == ".safetensors" else torch.save)(state, source)
    total = source.stat().st_size
    assert total > 15 * LAYER_BYTES
    command = [sys.executable, "-c", PERMUTE, str(LAYERS), str(EXPERTS), str(source), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    growth = json.loads(done.stdout)["growth"]
    print(f"private memory grew by {growth} bytes on a file of {total}")
    assert growth < LAYER_BYTES, f"private memory grew by {growth} bytes on a file of {total}"
    assert (
        np.bincount(np.fromfile(out, dtype=np.uint8), minlength=EXPERTS)[1:EXPERTS]
        >= 2 * LAYERS * EXPERT_BYTES
    ).all()
