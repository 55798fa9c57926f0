"""Benches outside the experts: dense products, and the passes over tokens around them.

``T`` tokens, ``H`` hidden, ``E`` experts, ``K`` top-k. The output head is a product with ``n`` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeplan.errors import SpecError
from moeplan.profiling.device import Device
from moeplan.profiling.protocol import Bench, Call, Series, shrunk
from moeplan.specs.model import ModelSpec

__all__ = ["elementwise_bench", "gemm_bench", "gemm_shapes", "optimizer_bench"]

_VOCABULARY = 32768  # rows of the embedding that is gathered from: beyond any cache, whatever the model's
Prepare = Callable[[Series, int], Call]


def gemm_shapes(model: ModelSpec, tp: int = 1) -> list[tuple[int, int]]:
    """(n, k) of the dense products of one rank: attention, router, shared experts or dense FFN, head, and to the latent
    width of experts and back, which is whole on each rank."""
    hidden, routed = model.hidden_size, model.routed_hidden_size
    shapes = [(model.num_experts, hidden), (max(1, model.vocab_size // tp), hidden)]
    for width in (model.shared_intermediate_size, model.dense_intermediate_size):
        if width:
            shapes += [((2 if model.gated_ffn else 1) * width // tp, hidden), (hidden, width // tp)]
    if routed != hidden:
        shapes += [(routed, hidden), (hidden, routed)]
    if (a := model.attention) is not None and a.kv_lora_rank is not None:
        nope, rope = a.qk_nope_head_dim or 0, a.qk_rope_head_dim or 0
        heads = a.num_heads // tp
        if a.q_lora_rank:
            shapes += [(a.q_lora_rank, hidden)]
        shapes += [
            (heads * (nope + rope), a.q_lora_rank or hidden),
            (a.kv_lora_rank + rope, hidden),
            (heads * (nope + a.head_dim), a.kv_lora_rank),
            (hidden, heads * a.head_dim),
        ]
    elif a is not None:
        heads, kv_heads = a.num_heads // tp, max(1, a.num_kv_heads // tp)
        shapes += [((heads + 2 * kv_heads) * a.head_dim, hidden), (hidden, heads * a.head_dim)]
    return list(dict.fromkeys(shapes))


def gemm_bench(
    device: Device,
    shapes: Sequence[tuple[int, int]],
    dtype: str,
    directions: Sequence[str] = ("forward",),
    max_tokens: int = 16384,
) -> Bench:
    """One series over ``m`` per (n, k) and direction.

    Raises:
        SpecError: the type is none for which this profiler has a dense kernel, or no size suits it.
    """
    if dtype not in ("fp32", "bf16", "fp16", "fp8"):
        raise SpecError(
            f"dtype ({dtype}): dense products are measured in fp32, bf16, fp16 or fp8; add one of these to --dtype"
        )
    if dtype == "fp8" and "backward" in directions:
        raise SpecError("direction (backward) is not measured for dtype (fp8), it has no gradient; use another --dtype")
    device.dtype(dtype)
    left_out: list[str] = []
    if dtype == "fp8":
        odd = [f"n {n} k {k}" for n, k in shapes if n % 16 or k % 16]
        shapes = [(n, k) for n, k in shapes if n % 16 == 0 and k % 16 == 0]
        if not shapes:
            raise SpecError(f"dtype (fp8): n and k ({', '.join(odd)}) must divide by 16; use another --dtype")
        left_out += [f"gemm fp8 {size}: not measured, n and k must divide by 16" for size in odd]
    series, what = [], {}

    def add(n: int, k: int, direction: str) -> None:
        def row(m: int) -> Mapping[str, Any]:
            kernel = "scaled_mm" if dtype == "fp8" else "linear"
            key = {"backend": "moeplan", "kernel": kernel, "m": m, "n": n, "k": k, "dtype": dtype}
            return {**key, "direction": direction}

        label = f"gemm n{n} k{k} {dtype} {direction}"
        what[label] = n, k, direction
        high = max(1, min(max_tokens, int(device.free_bytes / 3 // (4 * (n + k)))))
        left_out.extend(shrunk(label, max_tokens, high))
        series.append(Series("gemm", label, row, 1, high, 7))

    for n, k in shapes:
        for direction in directions:
            add(n, k, direction)
    return Bench(f"gemm {dtype}", tuple(series), lambda: _open_gemm(device, dtype, what), tuple(left_out))


def _open_gemm(device: Device, dtype: str, what: Mapping[str, tuple[int, int, str]]) -> Prepare:
    torch = device.torch
    kind = device.dtype(dtype)
    weights: dict[tuple[int, int], list[Any]] = {}
    for n, k, _ in what.values():
        if (n, k) not in weights:
            size = {"fp32": 4, "fp8": 1}.get(dtype, 2)
            count = device.copies(n * k * size, most=16)
            weights[n, k] = [device.normal((n, k), kind, k**-0.5) for _ in range(count)]
            if dtype == "fp8":
                weights[n, k] = [w.to(torch.float8_e4m3fn) for w in weights[n, k]]

    def prepare(series: Series, m: int) -> Call:
        n, k, direction = what[series.label]
        x, own = device.normal((m, k), kind), weights[n, k]
        linear = torch.nn.functional.linear
        if direction == "forward" and dtype == "fp8":
            one = torch.ones((), device=device.kind)
            x8 = x.to(torch.float8_e4m3fn)

            def scaled(i: int) -> object:
                w = own[i % len(own)].t()
                return torch._scaled_mm(x8, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

            return scaled
        if direction == "forward":

            def forward(i: int) -> object:
                with torch.inference_mode():
                    return linear(x, own[i % len(own)])

            return forward
        graphs = []
        for w in own[:2]:
            leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
            out = linear(*leaves)
            graphs.append((out, leaves, device.normal(out.shape, kind)))

        def backward(i: int) -> object:
            out, leaves, gradient = graphs[i % len(graphs)]
            return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

        return backward

    return prepare


def elementwise_bench(
    device: Device,
    hidden: int,
    inter: int,
    num_experts: int,
    top_k: int,
    dtype: str,
    max_tokens: int = 16384,
    directions: Sequence[str] = ("forward",),
    routed_hidden: int = 0,
) -> Bench:
    """Router top-k, permute, unpermute, norm, activation and embedding over tokens; backward of the middle four.

    ``routed_hidden`` is the width that is permuted, where experts have one of their own.

    Raises:
        SpecError: the type is none for activations.
    """
    if dtype not in ("fp32", "bf16", "fp16"):
        raise SpecError(f"dtype ({dtype}): passes over tokens are measured in fp32, bf16 or fp16")
    device.dtype(dtype)
    size = 4 if dtype == "fp32" else 2
    routed_hidden = routed_hidden or hidden
    widest = max(hidden, routed_hidden, 2 * inter)
    high = max(1, min(max_tokens, int(device.free_bytes / 8 // (size * top_k * widest))))
    widths = {"permute": routed_hidden, "unpermute": routed_hidden, "activation": inter}
    series = []

    def add(op: str, direction: str, routed: bool) -> None:
        def row(tokens: int) -> Mapping[str, Any]:
            return {
                "backend": "moeplan",
                "kernel": _KERNEL[op],
                "op": op,
                "tokens": tokens,
                "hidden": widths.get(op, hidden),
                "num_experts": num_experts if routed else 0,
                "top_k": top_k if routed else 0,
                "dtype": dtype,
                "direction": direction,
            }

        turn = " backward" if direction == "backward" else ""
        series.append(Series("elementwise", f"{op} H{widths.get(op, hidden)} {dtype}{turn}", row, 1, high, 6))

    for direction in directions:
        for op in _KERNEL if direction == "forward" else ("permute", "unpermute", "norm", "activation"):
            add(op, direction, op in ("router", "permute", "unpermute"))
    shape = (hidden, routed_hidden, inter, num_experts, top_k)
    name = f"elementwise H{hidden} {dtype}"
    left_out = shrunk(name, max_tokens, high)
    return Bench(name, tuple(series), lambda: _open_elementwise(device, shape, dtype), left_out)


_KERNEL = {
    "router": "softmax_topk",
    "permute": "argsort_gather",
    "unpermute": "index_add",
    "norm": "rms_norm",
    "activation": "silu_mul",
    "embedding": "gather",
}


def _open_elementwise(device: Device, shape: tuple[int, int, int, int, int], dtype: str) -> Prepare:
    torch = device.torch
    hidden, routed_hidden, inter, num_experts, top_k = shape
    kind = device.dtype(dtype)
    table = device.normal((_VOCABULARY, hidden), kind)
    gain = device.normal((hidden,), kind)

    def prepare(series: Series, tokens: int) -> Call:
        op, direction = (str(series.row(tokens)[column]) for column in ("op", "direction"))
        widths = {"router": num_experts, "permute": routed_hidden, "unpermute": top_k * routed_hidden}
        wide = (widths | {"activation": 2 * inter}).get(op, hidden)
        count = device.copies(tokens * wide * (4 if dtype == "fp32" else 2), most=16)
        xs = [device.normal((tokens, wide), kind) for _ in range(count)]
        chosen_TK = torch.rand((tokens, num_experts), device=device.kind).topk(top_k, 1).indices
        order = chosen_TK.flatten().argsort()
        ids = torch.randint(0, _VOCABULARY, (count, tokens), device=device.kind)
        scores = torch.rand((tokens * top_k, 1), device=device.kind).to(kind)
        functional = torch.nn.functional

        def router(x: Any, i: int) -> Any:
            top = x.float().softmax(-1).topk(top_k, -1)
            return top.values / top.values.sum(-1, keepdim=True), top.indices

        def permute(x: Any, i: int) -> Any:
            return x[chosen_TK.flatten().argsort(stable=True) // top_k]

        def unpermute(x: Any, i: int) -> Any:
            rows = x.reshape(tokens * top_k, routed_hidden) * scores
            sums = torch.zeros((tokens, routed_hidden), dtype=kind, device=device.kind)
            return sums.index_add_(0, order // top_k, rows)

        def norm(x: Any, i: int) -> Any:
            return functional.rms_norm(x, (hidden,), gain, 1e-6)

        def activation(x: Any, i: int) -> Any:
            gate, up = x.chunk(2, -1)
            return functional.silu(gate) * up

        def embedding(x: Any, i: int) -> Any:
            return functional.embedding(ids[i % count], table)

        run = {f.__name__: f for f in (router, permute, unpermute, norm, activation, embedding)}[op]

        def forward(i: int) -> object:
            with torch.inference_mode():
                return run(xs[i % count], i)

        if direction == "forward":
            return forward
        graphs = []
        for i, x in enumerate(xs[:2]):
            leaf = x.detach().requires_grad_()
            out = run(leaf, i)
            graphs.append((out, leaf, device.normal(out.shape, out.dtype)))

        def backward(i: int) -> object:
            out, leaf, gradient = graphs[i % len(graphs)]
            return torch.autograd.grad(out, leaf, gradient, retain_graph=True)

        return backward

    return prepare


def optimizer_bench(device: Device, hidden: int) -> Bench:
    """A step of Adam over ``T`` rows of ``H`` parameters: fp32 weights, gradients and moments, 28 bytes each moved."""
    torch = device.torch
    high = max(1, min(2**26, int(device.free_bytes / 8 / 16)) // hidden)

    def row(rows: int) -> Mapping[str, Any]:
        key = {"backend": "moeplan", "kernel": "fused_adam", "op": "optimizer", "tokens": rows, "hidden": hidden}
        return {**key, "dtype": "fp32", "direction": "forward"}

    def prepare(series: Series, rows: int) -> Call:
        weight = device.normal((rows, hidden), torch.float32).requires_grad_()
        weight.grad = device.normal((rows, hidden), torch.float32)
        optimizer = torch.optim.Adam([weight], fused=True)

        def step(i: int) -> object:
            optimizer.step()
            return weight

        return step

    return Bench("optimizer", (Series("elementwise", f"optimizer H{hidden}", row, 1, high, 6),), lambda: prepare)
