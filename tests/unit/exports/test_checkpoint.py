"""A permuted checkpoint is the same model: outputs, and one more optimizer step, agree."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are read with torch")

from safetensors.torch import load_file, save_file
from torch import nn

from moeplan.errors import ExportError, InputError
from moeplan.exports.base import ExportContext
from moeplan.exports.checkpoint import RECORD_NAME
from moeplan.registry import load_plugin
from moeplan.testing.exporters import plan_of, tiny_model

E, H, F, K = 8, 6, 5, 2
LAYERS = (1, 2)
GROUPS = 4
MODEL = tiny_model(E, num_layers=3, moe_layer_ids=LAYERS, hidden_size=H, expert_intermediate_size=F)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(H, F, bias=False), nn.Linear(H, F, bias=False)
        self.w2 = nn.Linear(F, H, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Moe(nn.Module):
    """Top-k softmax, or sigmoid with a selection bias over two of four groups (DeepSeek-V3's rule)."""

    def __init__(self, limited):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.limited = limited
        if limited:
            self.gate.e_score_correction_bias = nn.Parameter(torch.randn(E))

    def forward(self, x):
        logits = self.gate(x)
        if self.limited:
            scores = logits.sigmoid()
            biased = scores + self.gate.e_score_correction_bias
            best = biased.view(len(x), GROUPS, -1).topk(2, dim=2).values.sum(2).topk(2, dim=1).indices
            allowed = torch.zeros(len(x), GROUPS, dtype=torch.bool).scatter(1, best, True)
            chosen = (
                biased.masked_fill(~allowed.repeat_interleave(E // GROUPS, 1), -torch.inf).topk(K).indices
            )
            weight = scores.gather(1, chosen)
        else:
            weight, chosen = logits.softmax(-1).topk(K)
        dense = torch.zeros_like(logits).scatter(1, chosen, weight / weight.sum(1, keepdim=True))
        return sum(dense[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class Layer(nn.Module):
    def __init__(self, moe, limited):
        super().__init__()
        self.mlp = Moe(limited) if moe else nn.Linear(H, H)
        self.norm = nn.LayerNorm(H)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, limited=False):
        super().__init__()
        self.layers = nn.ModuleList(Layer(i in LAYERS, limited) for i in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def net():
    torch.manual_seed(3)
    return Model()


@pytest.fixture
def plan(rng):
    return plan_of([rng.permutation(E) for _ in LAYERS], MODEL, 4)


@pytest.fixture
def x():
    return torch.randn(64, H, generator=torch.Generator().manual_seed(9), dtype=torch.float32)


def permute(plan, source, out, target="megatron", groups=1):
    context = ExportContext(checkpoint=source, num_groups=groups)
    return load_plugin("exporters", target).export(plan, out, context)


def outputs(state, x, limited=False):
    model = Model(limited)
    model.load_state_dict(state)
    with torch.no_grad():
        return model(x)


# One layer's canonical parts (router [E, H], experts {name: [E, out, in]}) in the names of each family, and
# back.
def numbered(router, expert):
    def to(layer, gate, parts):
        found = {router.format(layer): gate}
        for name, stack in parts.items():
            for e in range(E):
                found[expert.format(layer, e, name)] = stack[e].clone()
        return found

    def back(layer, state):
        names = ("w1", "w2", "w3")
        parts = {n: torch.stack([state[expert.format(layer, e, n)] for e in range(E)]) for n in names}
        return state[router.format(layer)], parts

    return to, back


def fused(router, first, second, major=False):
    def to(layer, gate, parts):
        up = torch.cat([parts["w1"], parts["w3"]], 1).transpose(1, 2).contiguous()  # [E, H, 2F]
        down = parts["w2"].transpose(1, 2).contiguous()  # [E, F, H]
        if major:  # the older grouped form: same memory, seen as [H, E * 2F] and [E * F, H]
            up, down = up.view(H, -1), down.view(-1, H)
        return {router.format(layer): gate, first.format(layer): up, second.format(layer): down}

    def back(layer, state):
        up = state[first.format(layer)].view(E, H, 2 * F).transpose(1, 2)
        down = state[second.format(layer)].view(E, F, H).transpose(1, 2)
        return state[router.format(layer)], {"w1": up[:, :F], "w3": up[:, F:], "w2": down}

    return to, back


FAMILIES = {
    "mixtral": numbered(
        "model.layers.{}.block_sparse_moe.gate.weight",
        "model.layers.{}.block_sparse_moe.experts.{}.{}.weight",
    ),
    "qwen": numbered("model.layers.{}.mlp.gate.weight", "model.layers.{}.mlp.experts.{}.{}_proj.weight"),
    "fused": fused(
        "model.layers.{}.mlp.router.weight",
        "model.layers.{}.mlp.experts.gate_up_proj",
        "model.layers.{}.mlp.experts.down_proj",
    ),
    "megatron sequential": numbered(
        "decoder.layers.{}.mlp.router.weight", "decoder.layers.{}.mlp.experts.local_experts.{}.{}.weight"
    ),
    "megatron stacked": fused(
        "decoder.layers.{}.mlp.router.weight",
        "decoder.layers.{}.mlp.experts.experts.linear_fc1.weight",
        "decoder.layers.{}.mlp.experts.experts.linear_fc2.weight",
    ),
    "megatron grouped gemm": fused(
        "decoder.layers.{}.mlp.router.weight",
        "decoder.layers.{}.mlp.experts.weight1",
        "decoder.layers.{}.mlp.experts.weight2",
        major=True,
    ),
    "deepspeed": numbered(
        "transformer.layers.{}.mlp.deepspeed_moe.gate.wg.weight",
        "transformer.layers.{}.mlp.deepspeed_moe.experts.deepspeed_experts.{}.{}.weight",
    ),
}


def canonical(net, layer):
    moe = net.layers[layer].mlp
    parts = {n: torch.stack([getattr(e, n).weight.detach() for e in moe.experts]) for n in ("w1", "w2", "w3")}
    return moe.gate.weight.detach().clone(), parts


def with_moe(net, layer, gate, parts):
    state = {}
    for e in range(E):
        for name, stack in parts.items():
            state[f"layers.{layer}.mlp.experts.{e}.{name}.weight"] = stack[e]
    return state | {f"layers.{layer}.mlp.gate.weight": gate}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_do_not_change_in_any_family(family, suffix, net, plan, x, tmp_path):
    to, back = FAMILIES[family]
    state = {"model.layers.0.mlp.gate_proj.weight": torch.randn(3, 3), "model.norm.weight": torch.randn(3)}
    for layer in LAYERS:
        state |= to(layer, *canonical(net, layer))
    source, out = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, source)
    assert permute(plan, source, out, "deepspeed" if family == "deepspeed" else "megatron") == [out]
    permuted = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert set(permuted) == set(state)
    assert torch.equal(
        permuted["model.layers.0.mlp.gate_proj.weight"], state["model.layers.0.mlp.gate_proj.weight"]
    )
    whole = net.state_dict()
    for layer, row in zip(LAYERS, plan.physical_to_logical_map, strict=True):
        gate, parts = back(layer, permuted)
        old_gate, old_parts = canonical(net, layer)
        assert torch.equal(gate, old_gate[list(row)])
        assert all(torch.equal(parts[name], old_parts[name][list(row)]) for name in parts)
        whole |= with_moe(net, layer, gate, parts)
    torch.testing.assert_close(outputs(whole, x), net(x).detach(), rtol=1e-6, atol=1e-6)


def test_te_grouped_names_and_a_sharded_scale_move_with_their_expert(plan, tmp_path):
    state = {}
    for layer in LAYERS:
        state[f"decoder.layers.{layer}.mlp.router.weight"] = torch.randn(E, H)
        state[f"decoder.layers.{layer}.mlp.router.expert_bias"] = torch.randn(E)
        for e in range(E):
            for name in ("linear_fc1", "linear_fc2"):
                state[f"decoder.layers.{layer}.mlp.experts.{name}.weight{e}"] = torch.full(
                    (2,), 100.0 * layer + e
                )
    save_file(state, tmp_path / "in.safetensors")
    permute(plan, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    permuted = load_file(tmp_path / "out.safetensors")
    for layer, row in zip(LAYERS, plan.physical_to_logical_map, strict=True):
        bias = f"decoder.layers.{layer}.mlp.router.expert_bias"
        assert torch.equal(permuted[bias], state[bias][list(row)])
        for new, old in enumerate(row):
            name = f"decoder.layers.{layer}.mlp.experts.linear_fc2.weight{new}"
            assert permuted[name].tolist() == [100.0 * layer + old] * 2


def group_plan(rng):
    """Groups change places and order inside, but stay whole."""
    size = E // GROUPS
    return plan_of(
        [
            [int(g) * size + int(i) for g in rng.permutation(GROUPS) for i in rng.permutation(size)]
            for _ in LAYERS
        ],
        MODEL,
        4,
    )


def test_group_limited_sigmoid_routing_keeps_its_outputs(rng, x, tmp_path):
    torch.manual_seed(4)
    net = Model(limited=True)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"n_group": GROUPS, "topk_group": 2}))
    save_file(net.state_dict(), folder / "model.safetensors")
    plan = group_plan(rng)
    permute(plan, folder, tmp_path / "out", groups=None)
    permuted = load_file(tmp_path / "out" / "model.safetensors")
    key = "layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(permuted[key], net.state_dict()[key][list(plan.physical_to_logical_map[0])])
    torch.testing.assert_close(outputs(permuted, x, True), net(x).detach(), rtol=1e-6, atol=1e-6)
    mixed = plan_of([rng.permutation(E) for _ in LAYERS], MODEL, 4)
    with pytest.raises(ExportError, match="mixes experts of different groups"):
        permute(mixed, folder, tmp_path / "out2", groups=None)
    # the refusal is not idle: forced through, the mixed permutation changes the outputs
    permute(mixed, folder, tmp_path / "out3", groups=1)
    wrong = outputs(load_file(tmp_path / "out3" / "model.safetensors"), x, True)
    assert (wrong - net(x)).abs().max() > 1e-3


@pytest.mark.parametrize("keyed", ["by name", "by number with param_names"])
def test_one_more_adam_step_gives_the_permuted_weights(keyed, net, plan, x, tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()

    optimizer = torch.optim.Adam(net.named_parameters(), lr=1e-2)
    for _ in range(3):
        step(net, optimizer)
    saved = optimizer.state_dict()
    names = saved["param_groups"][0]["param_names"]
    if keyed == "by name":
        state = {names[i]: value for i, value in saved["state"].items()}
        saved = {"state": state, "param_groups": [saved["param_groups"][0] | {"params": names}]}
    torch.save({"model": net.state_dict(), "optimizer": saved, "step": 3}, tmp_path / "in.pt")
    permute(plan, tmp_path / "in.pt", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["step"] == 3
    state = found["optimizer"]["state"]
    if keyed == "by name":
        state = {i: state[name] for i, name in enumerate(names)}
    other = Model()
    other.load_state_dict(found["model"])
    resumed = torch.optim.Adam(other.named_parameters(), lr=1e-2)
    resumed.load_state_dict(resumed.state_dict() | {"state": state})
    step(net, optimizer)
    step(other, resumed)
    for layer, row in zip(LAYERS, plan.physical_to_logical_map, strict=True):
        gate, parts = canonical(net, layer)
        new_gate, new_parts = canonical(other, layer)
        torch.testing.assert_close(new_gate, gate[list(row)], rtol=1e-5, atol=1e-6)
        for name, stack in parts.items():
            torch.testing.assert_close(new_parts[name], stack[list(row)], rtol=1e-5, atol=1e-6)


def test_flat_optimizer_names_in_safetensors(net, plan, tmp_path):
    state = {}
    for name, value in net.state_dict().items():
        state[name] = value
        state[f"optimizer.state.exp_avg.{name}"] = value * 2
        state[f"optimizer.state.{name}.exp_avg_sq"] = value**2
    save_file(state, tmp_path / "in.safetensors")
    permute(plan, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    permuted = load_file(tmp_path / "out.safetensors")
    changed = [n for n in net.state_dict() if not torch.equal(permuted[n], state[n])]
    assert changed
    for name in net.state_dict():
        assert torch.equal(permuted[f"optimizer.state.exp_avg.{name}"], permuted[name] * 2)
        assert torch.equal(permuted[f"optimizer.state.{name}.exp_avg_sq"], permuted[name] ** 2)


def sharded(net, folder, save, suffix):
    """Tensors dealt over three shards in turn, so that experts of one layer stand in different files."""
    folder.mkdir()
    items = list(net.state_dict().items())
    names = [f"model-0000{i + 1}-of-00003{suffix}" for i in range(3)]
    for i, name in enumerate(names):
        save(dict(items[i::3]), folder / name)
    index = {"metadata": {}, "weight_map": {key: names[i % 3] for i, (key, _) in enumerate(items)}}
    (folder / f"model{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("kept")
    (folder / "training_args.bin").write_bytes(b"not tensors, and not our business")
    return names


@pytest.mark.parametrize(("save", "suffix"), [(save_file, ".safetensors"), (torch.save, ".bin")])
def test_sharded_directories(save, suffix, net, plan, x, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    names = sharded(net, source, save, suffix)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="does not hold a permuted checkpoint"):
        permute(plan, source, out, groups=None)
    (out / "thesis.txt").rename(out / "stale.txt")
    (out / RECORD_NAME).write_text("{}")
    permute(plan, source, out, groups=None)
    inside = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == inside | {RECORD_NAME}
    for name in inside - set(names):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    state = {}
    for name in names:
        shard = (
            load_file(out / name) if suffix == ".safetensors" else torch.load(out / name, weights_only=True)
        )
        state |= shard
    assert not torch.equal(state["layers.1.mlp.gate.weight"], net.state_dict()["layers.1.mlp.gate.weight"])
    torch.testing.assert_close(outputs(state, x), net(x).detach(), rtol=1e-6, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(InputError, match="is permuted already"):
        permute(plan, out, tmp_path / "again", groups=None)
    (source / names[1]).unlink()
    with pytest.raises(InputError, match=f"{names[1]} is missing, but model{suffix}.index.json names it"):
        permute(plan, source, tmp_path / "third", groups=None)
    assert not (tmp_path / "third").exists()


def test_deepspeed_expert_files(net, plan, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    prefix = "layers.{}.mlp.deepspeed_moe."
    torch.save(
        {"module": {prefix.format(i) + "gate.wg.weight": canonical(net, i)[0] for i in LAYERS}},
        source / "mp_rank_00_model_states.pt",
    )
    for number, layer in enumerate(LAYERS):
        for e in range(E):
            name = prefix.format(layer) + f"experts.deepspeed_experts.{e}.w1.weight"
            path = source / f"layer_{number}_expert_{e}_mp_rank_00_model_states.pt"
            torch.save({name: canonical(net, layer)[1]["w1"][e].clone()}, path)
    permute(plan, source, tmp_path / "out", "deepspeed")
    for number, layer in enumerate(LAYERS):
        row = plan.physical_to_logical_map[number]
        for new, old in enumerate(row):
            path = tmp_path / "out" / f"layer_{number}_expert_{new}_mp_rank_00_model_states.pt"
            found = torch.load(path, weights_only=True)
            name = prefix.format(layer) + f"experts.deepspeed_experts.{new}.w1.weight"
            assert torch.equal(found[name], canonical(net, layer)[1]["w1"][old])
    optimizer = source / "expp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({}, optimizer)
    with pytest.raises(ExportError, match=r"optim_states\.pt is optimizer state without parameter names.*leave it out"):
        permute(plan, source, tmp_path / "out2", "deepspeed")
    optimizer.rename(source / "zero_pp_rank_0_mp_rank_00_model_states.pt")  # stage 3: empty tensors, weights elsewhere
    with pytest.raises(ExportError, match="is of a sharded form"):
        permute(plan, source, tmp_path / "out2", "deepspeed")


def test_identity_is_byte_for_byte(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "in.safetensors", metadata={"format": "pt"})
    permute(plan_of([range(E)] * 2, MODEL, 4), tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


def without(state, *parts):
    return {name: value for name, value in state.items() if not any(part in name for part in parts)}


def damage_cases():
    router = "layers.1.mlp.gate"
    yield "no router", lambda s: without(s, router), InputError, "layer 1 has no router"
    yield (
        "no expert 5",
        lambda s: without(s, "layers.2.mlp.experts.5."),
        InputError,
        r"layer 2 has no expert 5 \(1 of 8",
    )
    yield (
        "no w1 of 5",
        lambda s: without(s, "layers.2.mlp.experts.5.w1"),
        InputError,
        r"experts\.5\.w1\.weight is missing",
    )
    yield (
        "no experts",
        lambda s: without(s, "layers.2.mlp.experts"),
        InputError,
        "layer 2 has no routed experts",
    )
    yield (
        "another width",
        lambda s: s | {f"{router}.weight": torch.zeros(16, H)},
        ExportError,
        r"first axis is not num_experts \(8\)",
    )
    yield (
        "hash routing",
        lambda s: s | {f"{router}.tid2eid": torch.zeros(32, 2)},
        ExportError,
        "tid2eid .* cannot be permuted",
    )
    yield (
        "expert 9",
        lambda s: s | {"layers.1.mlp.experts.9.w1.weight": torch.zeros(2)},
        ExportError,
        "is expert 9 but the plan has 8",
    )
    yield (
        "mixed types",
        lambda s: s | {"layers.1.mlp.experts.0.w1.weight": torch.zeros(F, H, dtype=torch.bfloat16)},
        ExportError,
        "type",
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("change", "error", "match"), [case[1:] for case in damage_cases()], ids=[c[0] for c in damage_cases()]
)
def test_what_would_change_the_model_is_refused(change, error, match, suffix, net, plan, tmp_path):
    (save_file if suffix == ".safetensors" else torch.save)(
        change(net.state_dict()), tmp_path / f"in{suffix}"
    )
    with pytest.raises(error, match=match):
        permute(plan, tmp_path / f"in{suffix}", tmp_path / f"out{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"in{suffix}"]


def test_optimizer_keyed_by_number_is_refused(net, plan, tmp_path):
    optimizer = torch.optim.Adam(net.parameters())
    (net(torch.ones(1, H)) ** 2).sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    with pytest.raises(ExportError, match="keyed by number"):
        permute(plan, tmp_path / "in.pt", tmp_path / "out.pt")


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_damaged_files(net, plan, tmp_path, capsys):
    good = tmp_path / "good.safetensors"
    save_file(net.state_dict(), good)
    data = good.read_bytes()
    length = int.from_bytes(data[:8], "little")
    shifted = (
        data[:8]
        + data[8 : 8 + length].replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1)
        + data[8 + length :]
    )
    cases = {
        "cut.safetensors": (data[:-10], "truncated"),
        "header.safetensors": (data[:100], "not a complete safetensors file"),
        "short.safetensors": (b"abc", "not a complete safetensors file"),
        "json.safetensors": (data[:8] + b"x" + data[9:], "header is damaged"),
        "list.safetensors": ((2).to_bytes(8, "little") + b"[]", "header is damaged"),
        "hole.safetensors": (shifted, "hole or overlap"),
        "cut.pt": (b"PK\x03\x04junk", "cut.pt"),
    }
    for name, (content, match) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=match):
            permute(plan, tmp_path / name, tmp_path / "out")
    torch.save({"model": net.state_dict(), "x": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(InputError, match=r"bomb\.pt.*never loaded"):
        permute(plan, tmp_path / "bomb.pt", tmp_path / "out")
    assert "boom" not in capsys.readouterr().out
    with pytest.raises(InputError, match="no such file"):
        permute(plan, tmp_path / "none", tmp_path / "out")
    with pytest.raises(InputError, match="overlap"):
        permute(plan, good, good)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        permute(plan, good, tmp_path / "file" / "out.safetensors")
    assert not (tmp_path / "out").exists()


def test_progress_reaches_the_end(net, plan, tmp_path):
    seen = []
    save_file(net.state_dict(), tmp_path / "in.safetensors")
    context = ExportContext(
        checkpoint=tmp_path / "in.safetensors", num_groups=1, progress=lambda _what, done: seen.append(done)
    )
    load_plugin("exporters", "megatron").export(plan, tmp_path / "out.safetensors", context)
    assert np.all(np.diff(seen) >= 0)
    assert seen[-1] == 1.0
