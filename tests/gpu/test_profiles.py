"""On a GPU: kernels right, events sane, and a fresh sample against the committed profile of this device."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moeplan.artifacts.profile import HardwareProfile
from moeplan.pipeline.profile_checks import check_profile
from moeplan.pipeline.profiling import ProfileRequest, Sizes, measure_profile

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

from moeplan.profiling.attention import banded_attention
from moeplan.profiling.device import find_device
from moeplan.profiling.expert_kernels import Weights, make_weights, runner
from moeplan.profiling.journal import Journal
from moeplan.profiling.memory import memory_bench
from moeplan.profiling.protocol import CudaTimer, Rig, run_benches
from moeplan.profiling.system import device_name

ROOT = Path(__file__).parents[2]


def _committed() -> list[Path]:
    device = device_name(find_device("cuda"))
    found = [path.parent for path in (ROOT / "profiles").glob("*/profile.json")]
    return [path for path in found if HardwareProfile.open(path).meta.device == device]


def test_fresh_sample_agrees_with_the_committed_profile():
    profiles = _committed()
    if not profiles:
        pytest.skip("no committed profile of this device")
    fresh = check_profile(profiles[0], fresh_s=60.0)["fresh"]
    assert fresh["points"] >= 10
    assert fresh["median"] <= 0.05


def _reference(x, weights: Weights, counts):
    out, row = [], 0
    for expert, count in enumerate(counts):
        h = x[row : row + count].float() @ weights.w13_EGH[expert].float().T
        gate, up = h.chunk(2, -1)
        out.append((torch.nn.functional.silu(gate) * up) @ weights.w2_EHF[expert].float().T)
        row += count
    return torch.cat(out)


@pytest.mark.parametrize("kernel", ["grouped_mm", "loop", "triton"])
def test_kernels_agree_with_fp32(kernel):
    device = find_device("cuda")
    weights = make_weights(device, "bf16", 4, 256, 512)
    counts = (40, 16, 8, 0)
    x = device.normal((64, 256), torch.bfloat16)
    y = runner(device, kernel, "bf16", counts)(x, weights).float()
    want = _reference(x, weights, counts)
    assert (y - want).norm() / want.norm() < 0.02


def test_fp8_agrees_with_its_dequantised_weights():
    device = find_device("cuda")
    if device.capability < (9, 0):
        pytest.skip("fp8 grouped products need compute capability 9.0")
    weights = make_weights(device, "fp8", 4, 256, 512)
    plain = Weights(
        weights.w13_EGH.float() * weights.scale13[..., None], weights.w2_EHF.float() * weights.scale2[..., None]
    )
    x = device.normal((64, 256), torch.bfloat16)
    y = runner(device, "grouped_mm", "fp8", (40, 16, 8, 0))(x, weights).float()
    want = _reference(x, plain, (40, 16, 8, 0))
    assert (y - want).norm() / want.norm() < 0.1


def test_a_band_agrees_with_a_masked_square():
    device, window, tokens, group = find_device("cuda"), 128, 1000, 8
    q, k, v = (device.normal((2, 4, tokens, *more, 64), torch.bfloat16) for more in ((group,), (), ()))
    got = torch.cat(banded_attention(device, window, group, torch.bfloat16)(q, k, v), 2).transpose(2, 3).flatten(1, 2)
    back = torch.arange(tokens, device="cuda")[:, None] - torch.arange(tokens, device="cuda")
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(2, 3).flatten(1, 2).float(), *(part.float().repeat_interleave(group, 1) for part in (k, v)),
        attn_mask=(back >= 0) & (back < window),
    )  # fmt: skip
    assert (got.float() - want).norm() / want.norm() < 0.02


def test_events_time_the_kernel_and_not_the_launch():
    """A product of known work runs below the device's peak, and its time grows with the work."""
    timer = CudaTimer()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    small = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    large_us = sorted(timer.time(lambda _i: a @ a, 9))[4]
    small_us = sorted(timer.time(lambda _i: small @ small, 9))[4]
    assert 2 * 4096**3 / (large_us * 1e-6) < 5e15
    assert large_us > 3 * small_us > 0


def test_copies_stay_below_a_plausible_bandwidth():
    rig = Rig(CudaTimer(), Journal(None, {}), random.Random(0))
    run_benches([memory_bench(find_device("cuda"), 2**28)], rig, 10.0)
    largest = {}
    for _, row, samples in rig.journal.points.values():
        key = row["op"], row["host_memory"], row["overlapped"]
        largest[key] = max(largest.get(key, (0, 0)), (row["message_size_bytes"], sorted(samples)[len(samples) // 2]))
    rate = {key: size / us * 1e6 for key, (size, us) in largest.items()}
    assert rate["device_copy", "", 0] > rate["host_to_device", "pinned", 0] > 0
    assert rate["host_to_device", "pinned", 0] >= 0.9 * rate["host_to_device", "pageable", 0]


def test_a_shape_beyond_the_memory_is_shrunk_or_left_out(tmp_path: Path):
    """Experts far larger than the device: spread over more ranks, and said."""
    sizes = Sizes(hidden=8192, inter=32768, experts=256, top_k=8)  # 412 GB in bf16
    request = ProfileRequest(parts=("experts",), sizes=sizes, device="cuda", max_tokens=256, budget_s=20.0)
    answer = measure_profile(request, tmp_path / "p")
    assert any("does not fit into memory, measured at ep" in line for line in answer["left_out"])
    assert answer["rows"]["experts"] > 0
