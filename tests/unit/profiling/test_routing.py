"""Recording: the callback against what was fed, Hugging Face routers against their own logits, a fake server."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from moeplan.cli import main
from moeplan.cli.profile_measure import routing as routing_command
from moeplan.errors import RunError, SpecError, TraceError

torch = pytest.importorskip("torch", reason="recording needs torch")

from moeplan.pipeline.record import record_routing
from moeplan.profiling import routing
from moeplan.profiling.routing import RoutingRecorder, cache_name, hook_model
from moeplan.profiling.sglang_recorder import SglangServer
from moeplan.routing.io import read_trace

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 48}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**MOE, **MLA, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2}
OVERHEAD = ("overhead", "overhead_spread")
FAMILIES = {
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48, "num_key_value_heads": 2},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48},
    "Qwen2Moe": {**MOE, "shared_expert_intermediate_size": 32, "num_key_value_heads": 2},
    "Qwen3Moe": {**MOE, "num_key_value_heads": 2, "head_dim": 8},
    "DeepseekV2": {**DEEPSEEK, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "DeepseekV3": {**DEEPSEEK, "topk_group": 1},
    "GptOss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}


def test_the_callback_keeps_tokens_phases_and_order():
    recorder = RoutingRecorder(num_experts=8)
    with recorder.step("prefill", seq_lens=[2, 1]):
        for layer in (3, 5):
            recorder.record(layer, torch.tensor([[layer, 0], [1, 2], [6, 7]]))
    buffer = np.array([[1, 4]])
    with recorder.step("decode", seq_lens=[1]):
        recorder.record(5, buffer)
        recorder.record(3, np.array([[0, 2]]))
        buffer[:] = 7  # a model may reuse its buffers
    trace = recorder.trace(recorded_from="test")
    assert trace.layer_ids == (3, 5)
    assert trace.experts_TLK[:, 0].tolist() == [[3, 0], [1, 2], [6, 7], [0, 2]]
    assert trace.experts_TLK[:, 1].tolist() == [[5, 0], [1, 2], [6, 7], [1, 4]]
    assert trace.phase_T.tolist() == [0, 0, 0, 1]
    assert trace.seq_lens_S.tolist() == [2, 1, 1]


def test_the_callback_refuses_misuse():
    recorder = RoutingRecorder(4)
    with pytest.raises(TraceError, match=r"belongs inside 'with recorder\.step"):
        recorder.record(0, [[1]])
    with (
        pytest.raises(TraceError, match=r"phase \(training\) must be one of prefill, decode"),
        recorder.step("training"),
    ):
        pass
    with recorder.step("prefill"):
        recorder.record(0, [[1]])
        with pytest.raises(TraceError, match="layer 0 was recorded twice"):
            recorder.record(0, [[1]])
        for layer, experts, scores, message in (
            (-1, [[1]], None, r"layer_id \(-1\) must be 0 or above"),
            (1, [[1.7]], None, r"experts of layer 1 \(float64 \[1, 1\]\) must be whole numbers of \[tokens, top_k\]"),
            (1, torch.tensor([1]), None, r"experts of layer 1 \(torch.int64 \[1\]\) must be whole numbers"),
            (1, [[1], [2]], None, r"experts of layer 1 \(\[2, 1\]\) must be .* first layer \(\[1, 1\]\)"),
            (1, [[1]], [[0.5, 0.5]], r"scores of layer 1 \(\[1, 2\]\) must be .* \(\[1, 1\]\)"),
        ):
            with pytest.raises(TraceError, match=message):
                recorder.record(layer, experts, scores)
        recorder.drop_step()
    with pytest.raises(TraceError, match=r"num_experts \(0\) must be 1 or above"):
        RoutingRecorder(0)
    with pytest.raises(TraceError, match="nothing was recorded"):
        recorder.trace()
    with pytest.raises(TraceError, match="has no module with 'experts'"), hook_model(torch.nn.Linear(2, 2)):
        pass


def _model(family):
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    config = getattr(transformers, f"{family}Config")(**SMALL, **FAMILIES[family])
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_routers(family):
    """What is recorded is what the experts were called with; padding dropped, decode marked."""
    model = _model(family)
    called: dict[str, list] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, name=name: called.setdefault(name, []).append(args[1].detach().clone())
                )
            )
    ids = torch.randint(1, 64, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with hook_model(model) as recorder, torch.inference_mode():
        first = model(input_ids=ids, attention_mask=mask, use_cache=True)
        longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        cache = cache_name(model)
        model(input_ids=ids[:, :1], attention_mask=longer, use_cache=True, **{cache: first[cache]})
    for handle in handles:
        handle.remove()
    trace = recorder.trace()
    assert trace.num_experts == 8
    assert trace.layer_ids == ((1, 2) if family.startswith("Deepseek") else (0, 1, 2))
    assert trace.phase_T.tolist() == [0] * 10 + [1] * 2
    assert trace.seq_lens_S.tolist() == [6, 4, 1, 1]
    assert len(called) == trace.num_layers
    for layer, (prefill, decode) in enumerate(called.values()):
        keep = mask.flatten().bool()
        want = torch.cat([prefill.reshape(12, -1)[keep], decode.reshape(2, -1)])
        assert trace.experts_TLK[:, layer].tolist() == want.tolist()


def test_hooks_are_gone_and_a_failed_pass_leaves_no_tokens():
    model = _model("Olmoe")
    with hook_model(model) as recorder:
        with pytest.raises(IndexError, match="index out of range"):
            model(input_ids=torch.full((1, 3), 1000))
        with torch.inference_mode():
            model(input_ids=torch.ones(1, 3, dtype=torch.long))
    with torch.inference_mode():
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert recorder.trace().num_tokens == 3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_and_caches_count_in_every_form_they_are_given(implementation):
    """By position as by name; of a static cache the mask has four axes, and the same tokens are recorded."""
    model = _model("Mixtral")
    model.set_attn_implementation(implementation)
    ids = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with hook_model(model) as recorder, torch.inference_mode():
        cache = model(ids, mask, use_cache=True)[cache_name(model)]
        model(ids[:, :1], torch.cat([mask, mask[:, -1:]], 1), None, cache)
    trace = recorder.trace()
    assert trace.phase_T.tolist() == [0] * 10 + [1] * 2
    assert trace.seq_lens_S.tolist() == [6, 4, 1, 1]
    made = []
    for kind in (None, "static"):
        with hook_model(model) as recorder:
            model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, cache_implementation=kind)
        made.append(recorder.trace())
    assert made[0].phase_T.tolist() == made[1].phase_T.tolist() == [0] * 10 + [1] * 6
    assert made[0].experts_TLK.tolist() == made[1].experts_TLK.tolist()


def test_a_mask_that_does_not_tell_the_padding_is_refused():
    model = _model("Mixtral")
    ids = torch.ones(2, 6, dtype=torch.long)
    for mask in (torch.ones(2, 6, 6), torch.ones(2, 1, 6, 4), torch.ones(2, 5), object()):
        with (
            hook_model(model),
            pytest.raises(TraceError, match=r"attention_mask \(.*\) does not tell which of 2 x 6 .*; give one of"),
        ):
            model(ids, attention_mask=mask)

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, *inputs, **named):
            return self.inner(*inputs, **named)

    wrapped = Wrapper()
    with hook_model(wrapped) as recorder, torch.inference_mode():
        wrapped(ids, attention_mask=torch.tensor([[1] * 6, [0] * 2 + [1] * 4]))
        with pytest.raises(TraceError, match=r"Wrapper takes \*inputs: name its arguments"):
            wrapped(ids, torch.ones_like(ids))
    assert recorder.trace().num_tokens == 10


def test_routers_outside_a_pass_of_the_model_are_not_recorded():
    """Backward runs the routers of checkpointed layers again; of a pass of the inner model alone one is told."""
    model = _model("Mixtral").train()
    ids = torch.ones(2, 6, dtype=torch.long)
    with hook_model(model) as inner, torch.inference_mode():
        model.model(ids)
    with pytest.raises(TraceError, match=r"3 calls of routers came outside a pass of the hooked model; call that"):
        inner.trace()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with hook_model(model) as recorder:
        for _ in range(2):
            model(ids, labels=ids, use_cache=False).loss.backward()
    assert recorder._outside == 6, "layers are computed again"
    assert recorder.trace().num_tokens == 24


def _bare_logits():
    """The layout of transformers 4: the gate is a linear layer."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts, self.top_k = torch.nn.Linear(4, 6), torch.nn.Identity(), 2

        def forward(self, x):
            self.logits = self.gate(x)
            return x

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Block()])

        def forward(self, input_ids):
            return self.layers[0](torch.nn.functional.one_hot(input_ids, 4).float())

    return Model()


def test_bare_logits_beside_a_top_k():
    model, recorder = _bare_logits(), RoutingRecorder(6)
    with hook_model(model, recorder), torch.inference_mode():
        model(input_ids=torch.tensor([[0, 1, 2]]))
    logits = model.layers[0].logits[0].numpy()
    assert recorder.trace().experts_TLK[:, 0].tolist() == np.argsort(-logits, 1)[:, :2].tolist()


def test_scores_of_all_experts_before_their_logits():
    """Llama 4: the scores that it weighs its experts with, 0 where not chosen."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 1, "intermediate_size": 32}
    config = transformers.Llama4TextConfig(**SMALL, **moe, intermediate_size_mlp=32, head_dim=8, num_key_value_heads=2)
    model, seen = transformers.Llama4ForCausalLM(config).eval(), []
    model.model.layers[0].feed_forward.router.register_forward_hook(lambda *call: seen.append(call[2]))
    with hook_model(model) as recorder, torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    trace, (score_TE, logit_TE) = recorder.trace(), seen[0]
    assert trace.experts_TLK[:, 0].tolist() == logit_TE.topk(2, -1).indices.tolist()
    assert trace.scores_TLK[:, 0] == pytest.approx(score_TE.topk(2, -1).values.numpy())


def test_a_router_that_is_not_understood_is_named_with_the_way_round_it():
    model = _bare_logits()
    model.layers[0].top_k = None
    message = r"router of Block returns \(\[1, 1, 6\]\), .* top-k \(None\); record it through RoutingRecorder.record"
    with hook_model(model, RoutingRecorder(6)), pytest.raises(TraceError, match=message):
        model(input_ids=torch.tensor([[0]]))


def test_the_overhead_of_recording_a_model_is_that_of_its_recorder(monkeypatch):
    """On a clock of its own: a plain pass takes 1 s, with the n-th recorded (from 0) n/10 s more; hooking 5 s."""
    model, now_s, passes = _bare_logits(), 0.0, []
    model.config = SimpleNamespace(num_experts=6)
    find = routing.find_routers

    def slow_find(model):
        nonlocal now_s
        now_s += 5
        return find(model)

    def slow_record(*_args):
        nonlocal now_s
        passes[-1] = True
        now_s += (passes.count(True) - 1) / 10

    def run():
        nonlocal now_s
        passes.append(False)
        model(input_ids=torch.tensor([[0, 1, 2]]))
        now_s += 1

    monkeypatch.setattr(routing, "find_routers", slow_find)
    monkeypatch.setattr(RoutingRecorder, "record", slow_record)
    monkeypatch.setattr(routing, "time", SimpleNamespace(perf_counter=lambda: now_s))
    median, spread = routing.measure_overhead(run, model)
    assert median == pytest.approx(0.45)
    assert spread == pytest.approx(0.56)
    assert passes == [True, *([False, True, True, False] * 4)], "one to warm up, then pairs that swap who goes first"


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_from_a_config_writes_a_trace(tmp_path: Path, family):
    """Without prompts no tokenizer is asked for: a config alone has none."""
    _model(family).config.save_pretrained(tmp_path / "m")
    answer = record_routing(tmp_path / "t.npz", hf=tmp_path / "m", random_init=True, max_new_tokens=2, device="cpu")
    assert answer["phases"] == {"prefill": 4 * 64, "decode": 4 * 2}
    assert answer["overhead"] > -1
    assert answer["overhead_spread"] > 0
    trace = read_trace(tmp_path / "t.npz")
    assert trace.num_tokens == answer["tokens"] == 264
    assert [trace.origin[name] for name in OVERHEAD] == [answer[name] for name in OVERHEAD]


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (IndexError("no such token"), 2, "error: prompt 2 of 4 failed: IndexError('no such token'); "),
        (RuntimeError("CUDA out of memory"), 2, "set a smaller dtype or fewer num_hidden_layers in its config.json"),
        (KeyboardInterrupt(), 130, "prompt 2 of 4 was interrupted; "),
    ],
)
def test_whatever_stops_a_model_keeps_the_prompts_done(tmp_path: Path, monkeypatch, capsys, raised, code, said):
    model = _model("Olmoe")
    model.config.save_pretrained(tmp_path / "m")
    words = ["moeplan", "profile", "routing", "--hf", tmp_path / "m", "--random-init", "--max-new-tokens", "2"]
    record_routing(tmp_path / "all.npz", tmp_path / "m", True, max_new_tokens=2, device="cpu")
    forward, recorded = type(model.model).forward, []

    def failing(self, *args, **kwargs):
        if kwargs.get("use_cache"):  # of the recording, not of the overhead
            recorded.append(0)
            if len(recorded) == 5:  # the second prompt's first decode
                raise raised
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", failing)
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--device", "cpu", "--out", str(tmp_path / "t.npz")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    told = capsys.readouterr().err
    assert said in told
    assert f"what was recorded until then is kept: {tmp_path / 't.npz'}, 66 tokens\n" in told
    kept = read_trace(tmp_path / "t.npz")
    assert kept.experts_TLK.tolist() == read_trace(tmp_path / "all.npz").experts_TLK[:66].tolist()
    assert kept.seq_lens_S.tolist() == [64, 1, 1]
    assert kept.origin["prompts"] == 1


def test_a_model_larger_than_the_memory_is_one_error(tmp_path: Path):
    config = _model("Olmoe").config
    config.intermediate_size = 2**40
    config.save_pretrained(tmp_path / "m")
    with pytest.raises(SpecError, match=r"m\) does not fit into the memory of cpu \(.*num_hidden_layers"):
        record_routing(tmp_path / "t.npz", tmp_path / "m", True, device="cpu")


def test_recording_from_disk_asks_for_what_it_needs(tmp_path: Path):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SpecError, match=r"config.json\) is a file: a config.json needs --random-init"):
        record_routing(tmp_path / "t.npz", hf=tmp_path / "config.json")
    with pytest.raises(SpecError, match="--hf needs --prompts"):
        record_routing(tmp_path / "t.npz", hf=tmp_path)
    with pytest.raises(SpecError, match=r"prompts \(.*none.txt\) cannot be read: No such file or directory$"):
        record_routing(tmp_path / "t.npz", hf=tmp_path, prompts=tmp_path / "none.txt", device="cpu")
    (tmp_path / "prompts.txt").write_text("hello")
    with pytest.raises(SpecError, match=r"cannot be loaded: Unrecognized model .*config.json.*; correct its config"):
        record_routing(tmp_path / "t.npz", hf=tmp_path, prompts=tmp_path / "prompts.txt", device="cpu")
    _model("Olmoe").config.save_pretrained(tmp_path / "olmoe")  # of which transformers 5 makes an empty tokenizer
    with pytest.raises(SpecError, match=r"has no tokenizer that can be loaded, and --prompts needs one"):
        record_routing(tmp_path / "t.npz", tmp_path / "olmoe", True, prompts=tmp_path / "prompts.txt", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match=r"device \(cuda\): torch .* sees no GPU"):
            record_routing(tmp_path / "t.npz", hf=tmp_path, random_init=True, device="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 9}, r"top_k \(9\) exceeds num_experts \(8\)"),
        ({"num_local_experts": -4}, r"num_local_experts \(-4\) is not one whole number"),
        ({"hidden_size": "big"}, r"cannot be loaded: .*'hidden_size' expected int, got str \(value: 'big'\); correct"),
        ({"num_attention_heads": 5, "head_dim": 8}, r"m\) fails in its first pass: .*; correct its config.json"),
    ],
)
def test_a_config_that_cannot_be_is_one_error(tmp_path: Path, change, message):
    _model("Mixtral").config.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SpecError, match=message):
        record_routing(tmp_path / "t.npz", tmp_path / "m", True, device="cpu")
    assert not (tmp_path / "t.npz").exists()


def test_a_models_own_code_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch, capfd):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    for name in ("config", "modeling"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto = {"AutoConfig": "config.C", "AutoModelForCausalLM": "modeling.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(SpecError, match=r"its own code \(auto_map in its config.json\), which is not run; give a mod"):
        record_routing(tmp_path / "t.npz", tmp_path, True, device="cpu")
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "ran").exists()


def test_recording_asks_for_what_it_needs(tmp_path: Path):
    with pytest.raises(SpecError, match="either --hf or --sglang"):
        record_routing(tmp_path / "t.npz")
    with pytest.raises(SpecError, match=r"out \(.*t.csv\) must end in .npz or .parquet"):
        record_routing(tmp_path / "t.csv", hf=tmp_path)
    with pytest.raises(SpecError, match="--sglang needs --dump-dir"):
        record_routing(tmp_path / "t.npz", sglang="http://127.0.0.1:1")
    with pytest.raises(SpecError, match="must be a URL"):
        SglangServer("127.0.0.1", tmp_path)
    with pytest.raises(TraceError, match="cannot be reached"):
        SglangServer("http://127.0.0.1:9", tmp_path, timeout_s=2).generate("x", 1)


@pytest.fixture
def server(tmp_path: Path, monkeypatch):
    """Answers like SGLang's HTTP server; writes a per_token dump of two prefill and one decode tokens."""
    quick = partialmethod(SglangServer.__init__, quiet_s=0.1, patience_s=0.5)
    monkeypatch.setattr(SglangServer, "__init__", quick)
    log: list[str] = []
    dump_dir = tmp_path / "dumps"
    dump_dir.mkdir()
    ids = torch.full((2, 3, 8), -1, dtype=torch.int32)
    ids[:, :, :2] = torch.tensor([[0, 1], [2, 3], [1, 0]])

    def record(number, mode, tokens):
        return {
            "forward_pass_id": number,
            "rank": 0,
            "forward_mode": mode,
            "extend_seq_lens": [tokens.shape[1]] if mode == 1 else None,
            "topk_ids_of_layer": tokens,
        }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            log.append(f"{self.path} {body.get('text', '')}".strip())
            if self.path == "/dump_expert_distribution_record":
                pack = {
                    "records": [record(1, 1, ids[:, :2]), record(2, 2, ids[:, 2:])],
                    "last_physical_to_logical_map": torch.arange(16).repeat(2, 1),
                }
                torch.save(pack, dump_dir / "expert_distribution_recorder_1.pt")
            refused = body.get("text") == "never" or (body.get("text") == "later" and log.count("/generate later") > 1)
            refused = refused or (self.path.startswith("/stop") and "/generate stuck" in log)
            recorder = [f"/{what}_expert_distribution_record" for what in ("start", "stop", "dump")]
            known = self.path in ("/generate", "/flush_cache", *recorder)
            self.send_response((400 if refused else 200) if known else 404)
            self.end_headers()
            self.wfile.write(b"the input\nis too long" if refused else b"{}")

        def log_message(self, *_args):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", dump_dir, log
    http.shutdown()
    http.server_close()
    thread.join()


def test_recording_from_a_server(server, tmp_path: Path):
    url, dump_dir, log = server
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\n")
    answer = record_routing(tmp_path / "t.npz", sglang=url, dump_dir=dump_dir, prompts=prompts)
    assert answer["phases"] == {"prefill": 2, "decode": 1}
    start, stop = log.index("/start_expert_distribution_record"), log.index("/stop_expert_distribution_record")
    assert [line for line in log[start:stop] if "generate" in line] == ["/generate one", "/generate two"]
    assert log[-1] == "/dump_expert_distribution_record"
    assert log[start - 1] == "/generate two", "timed once without recording first"
    assert log[start + 1] == "/flush_cache", "cached tokens would not be routed again"
    trace = read_trace(tmp_path / "t.npz")
    assert trace.experts_TLK[:, 0].tolist() == [[0, 1], [2, 3], [1, 0]]


@pytest.mark.parametrize("dies", [False, True])
def test_a_refused_request_keeps_what_the_server_recorded(server, tmp_path: Path, monkeypatch, dies):
    url, dump_dir, log = server
    prompts, out = tmp_path / "prompts.txt", tmp_path / "t.npz"
    prompts.write_text("one\nlater\nthree\n")
    said = rf"prompt 2 of 3 \('later'\) failed: {url}/generate answered 400 Bad Request: the input is too long; "
    if dies:  # the dump holds nothing that can be read
        monkeypatch.setattr(torch, "save", lambda _pack, path: path.write_bytes(b""))
        said += "nothing is kept: .*_1.pt"
    else:
        said += rf"what was recorded until then is kept: {out}, 3 tokens"
    with pytest.raises(RunError, match=said):
        record_routing(out, sglang=url, dump_dir=dump_dir, prompts=prompts)
    assert log[-3:] == ["/generate later", "/stop_expert_distribution_record", "/dump_expert_distribution_record"]
    if dies:
        assert not out.exists()
    else:
        assert read_trace(out).origin["prompts"] == 1


@pytest.mark.parametrize(("lines", "first"), [("stuck\n", "^"), ("stuck\nlater\n", r"^prompt 2 of 2 .* too long; ")])
def test_a_server_that_does_not_stop_recording_is_dumped(server, tmp_path: Path, lines, first):
    url, dump_dir, log = server
    prompts, out = tmp_path / "prompts.txt", tmp_path / "t.npz"
    prompts.write_text(lines)
    said = rf"the server may still be recording, tell it again to stop: {url}/stop_\w+ answered 400 "
    with pytest.raises(RunError, match=rf"{first}{said}.* is kept: {out}, 3 tokens$"):
        record_routing(out, sglang=url, dump_dir=dump_dir, prompts=prompts)
    assert log[-2:] == ["/stop_expert_distribution_record", "/dump_expert_distribution_record"]
    assert read_trace(out).origin["prompts"] == 1


@pytest.mark.parametrize(("lines", "spread"), [("one\n", r"of one prompt"), ("one\ntwo\n", r"spread \d+\.\d%")])
def test_the_overhead_of_a_server_is_told_with_its_spread(server, tmp_path: Path, lines, spread):
    url, dump_dir, _ = server
    prompts, out = tmp_path / "prompts.txt", tmp_path / "t.npz"
    prompts.write_text(lines)
    words = [*map(str, ["--sglang", url, "--dump-dir", dump_dir, "--prompts", prompts, "--out", out])]
    told = CliRunner().invoke(routing_command, words, catch_exceptions=False).stdout
    assert ", dumps of 1 rank (the server does not say of how many), overhead" in told
    assert re.search(rf", overhead of recording [+-]\d+\.\d% \({spread}(: no more than noise)?\)\n$", told)
    (dump_dir / "expert_distribution_recorder_1.pt").unlink()
    answer = json.loads(CliRunner().invoke(routing_command, [*words, "--json"], catch_exceptions=False).stdout)
    assert (answer["overhead_spread"] is None) == (lines == "one\n")
    assert [read_trace(out).origin[name] for name in OVERHEAD] == [answer[name] for name in OVERHEAD]


@pytest.mark.parametrize(
    ("overhead", "spread", "said"), [(-0.02, 0.05, "5.0%: no more than noise)"), (0.2, 0.05, "5.0%)")]
)
def test_an_overhead_within_its_spread_is_called_noise(monkeypatch, overhead, spread, said):
    answer = {"out": "t.npz", "tokens": 1, "phases": {}, "overhead": overhead, "overhead_spread": spread}
    monkeypatch.setattr("moeplan.pipeline.record.record_routing", lambda **_: answer)
    assert CliRunner().invoke(routing_command, ["--out", "t.npz"]).stdout.endswith(f"{said}\n")


def test_a_request_refused_before_recording_starts_no_recorder(server, tmp_path: Path):
    url, dump_dir, log = server
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("never\n")
    with pytest.raises(RunError, match=r"prompt 1 of 1 \('never'\) failed: .* too long; recording had not begun"):
        record_routing(tmp_path / "t.npz", sglang=url, dump_dir=dump_dir, prompts=prompts)
    assert log == ["/flush_cache", "/generate never"]


def test_an_interrupted_server_is_stopped_and_dumped(server, tmp_path: Path, monkeypatch):
    url, dump_dir, log = server
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    generate = SglangServer.generate

    def interrupted(self, prompt, max_new_tokens):
        if log.count("/generate two"):
            raise KeyboardInterrupt
        return generate(self, prompt, max_new_tokens)

    monkeypatch.setattr(SglangServer, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"prompt 1 of 2 \('one'\) was interrupted; .* is kept: .*, 3 tokens"):
        record_routing(tmp_path / "t.npz", sglang=url, dump_dir=dump_dir, prompts=prompts)
    assert log[-2:] == ["/stop_expert_distribution_record", "/dump_expert_distribution_record"]


def test_a_server_without_the_endpoint_is_named(server, tmp_path: Path):
    url, dump_dir, _ = server
    other = SglangServer(f"{url}/v0", dump_dir)
    with pytest.raises(TraceError, match=r"/start_\w+ answered 404.*expert-distribution-recorder-mode per_token$"):
        other.record(lambda: None)
    with pytest.raises(TraceError, match=r"/flush_cache answered 404 Not Found: \{\}$"):
        other.generate("x", 1)


def _dump(folder: Path, rank: int, first_expert: int, records: int = 1, seconds: float = 0.0) -> None:
    """A dump of one token of expert ``first_expert`` and the next; its second half ``seconds`` later."""
    ids = torch.full((2, 1, 8), -1, dtype=torch.int32)
    ids[:, :, :2] = torch.tensor([first_expert, first_expert + 1])
    record = {"forward_pass_id": 1, "rank": rank, "forward_mode": 1, "input_ids": [5], "topk_ids_of_layer": ids}
    buffer = io.BytesIO()
    torch.save(
        {"records": [record] * records, "last_physical_to_logical_map": torch.arange(16).repeat(2, 1)}, buffer
    )
    data = buffer.getvalue()
    with (folder / f"expert_distribution_recorder_{time.time()}_{rank}.pt").open("wb", buffering=0) as file:
        file.write(data[: len(data) // 2])
        time.sleep(seconds)
        file.write(data[len(data) // 2 :])


@pytest.fixture
def recording(tmp_path: Path, monkeypatch):
    """Records from a server whose dump runs the writers given in threads of their own, and that tells ``ranks``; one
    that is ``given_up`` soon answers when they have ended."""
    (tmp_path / "dumps").mkdir()
    (tmp_path / "prompts.txt").write_text("one\n")
    threads: list[threading.Thread] = []

    def record(ranks, *writers, given_up=False):
        def post(_self, path, body=None):
            if path.startswith("/dump"):
                threads.extend(threading.Thread(target=writer) for writer in writers)
                for thread in threads:
                    thread.start()
                for thread in threads if given_up else ():
                    thread.join()
            return b""

        quick = partialmethod(SglangServer.__init__, quiet_s=0.3, patience_s=0.6 if given_up else 60.0)
        monkeypatch.setattr(SglangServer, "__init__", quick)
        monkeypatch.setattr(SglangServer, "_post", post)
        monkeypatch.setattr(SglangServer, "info", lambda _self: {} if ranks is None else {"tp_size": ranks})
        return record_routing(
            tmp_path / "t.npz", sglang="http://x", dump_dir=tmp_path / "dumps", prompts=tmp_path / "prompts.txt"
        )

    yield record, tmp_path / "dumps"
    for thread in threads:
        thread.join()


def test_a_rank_that_dumps_late_or_slowly_is_waited_for(recording):
    record, folder = recording

    def late():
        time.sleep(1.0)
        _dump(folder, 1, 2)

    def slow():
        _dump(folder, 2, 4, seconds=1.0)

    answer = record(3, lambda: _dump(folder, 0, 0), late, slow)
    assert (answer["tokens"], answer["rank_files"], answer["ranks"]) == (3, 3, 3)
    trace = read_trace(folder.parent / "t.npz")
    assert (trace.origin["rank_files"], trace.origin["ranks"]) == (3, 3)
    assert sorted(trace.experts_TLK[:, 0, 0].tolist()) == [0, 2, 4]


def test_a_slow_dump_is_waited_for_also_where_ranks_are_not_known(recording):
    record, folder = recording
    answer = record(None, lambda: _dump(folder, 0, 0, seconds=1.0))
    assert (answer["tokens"], answer["rank_files"], answer["ranks"]) == (1, 1, None)


def test_ranks_that_ran_the_same_tokens_count_once_and_one_may_have_run_none(recording):
    record, folder = recording
    answer = record(3, *(lambda rank=rank: _dump(folder, rank, 0, records=rank < 2) for rank in range(3)))
    assert (answer["tokens"], answer["rank_files"]) == (1, 3)


def test_a_rank_that_does_not_dump_is_an_error_and_the_others_are_kept(recording):
    record, folder = recording
    with pytest.raises(RunError, match=r"dumps got the dumps of 1 of 2 ranks; .* is kept: .*t.npz, 1 tokens$"):
        record(2, lambda: _dump(folder, 0, 0), given_up=True)
    assert read_trace(folder.parent / "t.npz").origin["rank_files"] == 1


def test_a_dump_that_stays_cut_is_an_error_and_the_others_are_kept(recording):
    record, folder = recording
    cut = folder / "expert_distribution_recorder_9_1.pt"
    with pytest.raises(RunError, match=rf"{cut} \(1 of 2 dumps\) did not become whole; .* is kept: .*t.npz, 1 tokens$"):
        record(None, lambda: _dump(folder, 0, 0), lambda: cut.write_bytes(b"PK\3\4"), given_up=True)


@contextmanager
def _telling(path: str, info: object, keys: Callable[[str], str | None] = lambda path: None):
    """A server that tells ``info`` at ``path``, and asks for the key of a path; its URL, and what is posted to it."""
    posts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == path else 404)
            self.end_headers()
            self.wfile.write(json.dumps(info).encode())

        def do_POST(self):
            posts.append(self.path)
            key = keys(self.path)
            self.send_response(200 if key is None or self.headers["Authorization"] == f"Bearer {key}" else 401)
            self.end_headers()

        def log_message(self, *_args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", posts
        finally:
            http.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("path", "info", "ranks"),
    [
        ("/server_info", {"tp_size": 4, "dp_size": 4, "enable_dp_attention": True}, 4),
        ("/get_server_info", {"tp_size": 2, "dp_size": 3, "pp_size": 2, "nnodes": 2}, 12),
        ("/get_server_info", {"version": "?"}, None),
        ("/get_server_info", ["of", "another"], None),
        ("/other", {}, None),
    ],
)
def test_how_many_ranks_a_server_has(tmp_path: Path, path, info, ranks):
    with _telling(path, info) as (url, _):
        assert SglangServer(url, tmp_path).ranks() == ranks


_TOKENS = {"expert_distribution_recorder_mode": "per_token"}


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"expert_distribution_recorder_mode": None}, r"no routing \(\w+ is not set\)"),
        ({"expert_distribution_recorder_mode": "stat"}, r"counts only \(\w+ is stat\)"),
        ({**_TOKENS, "enable_dp_attention": True, "moe_a2a_backend": "none"}, r"other ranks' tokens \(enable_dp_"),
    ],
)
def test_a_server_that_does_not_record_its_tokens_is_sent_nothing(tmp_path: Path, info, said):
    """As SGLang 0.5.23 tells. Without a recorder it ends when told to start; in the third case, on two CPU ranks,
    no decoded token of the second had its own experts."""
    (tmp_path / "prompts.txt").write_text("one\n")
    with _telling("/server_info", info) as (url, posts), pytest.raises(TraceError, match=rf"{url} records {said}"):
        record_routing(tmp_path / "t.npz", sglang=url, dump_dir=tmp_path, prompts=tmp_path / "prompts.txt")
    assert posts == []


def test_keys_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SGLang 0.5.23 with both keys: the recorder and the cache take the administrator's, not the other."""
    asked = SglangServer("http://127.0.0.1:1", tmp_path, timeout_s=10.0)
    with _telling("/server_info", _TOKENS, lambda path: "any" if path == "/generate" else "root") as (asked.url, posts):
        for name, key in (("SGLANG_API_KEY", "any"), ("SGLANG_ADMIN_API_KEY", "root")):
            with pytest.raises(TraceError, match=r"answered 401 .*set SGLANG_API_KEY .*SGLANG_ADMIN_API_KEY"):
                asked.generate("one", 1)
            monkeypatch.setenv(name, key)
        assert asked.generate("one", 1) > 0
    assert posts == ["/flush_cache", "/flush_cache", "/flush_cache", "/generate"]


@pytest.mark.parametrize(
    "info",
    [
        {**_TOKENS, "enable_dp_attention": True, "moe_a2a_backend": "deepep"},
        {**_TOKENS, "enable_dp_attention": False, "moe_a2a_backend": "none"},
        {"version": "?"},
    ],
)
def test_a_server_that_records_its_tokens_or_does_not_tell_passes(tmp_path: Path, info):
    with _telling("/server_info", info) as (url, _):
        SglangServer(url, tmp_path).require_tokens()
