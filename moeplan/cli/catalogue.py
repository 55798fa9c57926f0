"""``moeplan models`` and ``moeplan clusters``."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import click

from moeplan.cli.common import names_of, output_options, print_json

__all__ = ["clusters", "models"]


@click.command()
@click.argument("name", required=False, shell_complete=names_of("models", or_file=True))
@output_options
def models(name: str | None, as_json: bool, quiet: bool) -> None:
    """List the built-in models, or show one.

    NAME is a slug or Hugging Face id in any case, or the path of a config.json.

    \b
    Example:
      moeplan models
      moeplan models deepseek-v3
      moeplan models ./Mixtral-8x7B-v0.1/config.json
    """
    from moeplan.pipeline.catalogue import model_entries, model_entry

    if name is not None:
        _show(model_entry(name), as_json)
        return
    entries = model_entries()
    if as_json:
        print_json({"models": entries})
        return
    header = ("name", "MoE layers", "experts", "top-k", "shared", "parameters", "KV cache")
    rows = []
    for e in entries:
        per_token = e["kv_bytes_per_token"]
        cache = "?" if per_token is None else f"{per_token / 1024:.1f} KiB/token"
        sizes = (e["moe_layers"], e["experts"], e["top_k"], e["shared_experts"])
        rows.append((e["name"], *sizes, f"{e['parameters'] / 1e9:.1f} B", cache))
    _table(header, rows, spare=("shared", "MoE layers", "KV cache"))


@click.command()
@click.argument("name", required=False, shell_complete=names_of("clusters", or_file=True))
@click.option("--nodes", type=click.IntRange(min=1), help="Nodes of a cluster named by its accelerator.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="Ranks of each node.")
@output_options
def clusters(
    name: str | None, nodes: int | None, ranks_per_node: int | None, as_json: bool, quiet: bool
) -> None:
    """List the built-in accelerators and their clusters, or show one with its routes.

    NAME is an accelerator in any case, or the path of a YAML or JSON file with a cluster's fields.

    \b
    Example:
      moeplan clusters
      moeplan clusters h100-sxm --nodes 4
      moeplan clusters cluster.yaml
    """
    from moeplan.pipeline.catalogue import cluster_entries, cluster_entry

    if name is not None:
        _show(cluster_entry(name, nodes, ranks_per_node), as_json)
        return
    if nodes or ranks_per_node:
        raise click.UsageError("--nodes and --ranks-per-node size a cluster; name one")
    entries = cluster_entries()
    if as_json:
        print_json({"clusters": entries})
        return
    header = ("name", "nodes x ranks", "topology", "memory", "read at", "bf16", "scale-up", "NIC")
    rows = []
    for e in entries:
        size = f"{e['nodes']} x {e['ranks_per_node']}"
        device = (e["memory"], e["memory_bandwidth"], e["bf16"])
        scale_up = f"{e['scale_up_bandwidth']} in {e['scale_up_domain']}"
        rows.append((e["name"], size, e["topology"], *device, scale_up, e["nic_bandwidth"]))
    _table(header, rows, spare=("topology", "nodes x ranks", "NIC", "read at", "scale-up"))


def _show(entry: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(entry)
        return
    rows: list[tuple[Any, ...]] = []
    for key, value in entry.items():
        if key == "routes":
            for route in value:
                speed = f"{route['bandwidth_bytes_per_s'] / 1e9:g} GB/s, {route['latency_s'] * 1e6:.3g} us"
                rows.append(("route", f"{speed}, {route['pairs']} pairs, as {' - '.join(route['example'])}"))
        elif key == "moe_layer_ids":
            rows.append((key, _run(value)))
        elif isinstance(value, dict):
            rows += [(f"{key}.{inner}", item) for inner, item in value.items() if item is not None]
        elif value not in (None, "", []):
            rows.append((key, value))
    _table(("field", "value"), rows)


def _run(numbers: list[int]) -> str:
    steps = {b - a for a, b in pairwise(numbers)}
    if len(steps) != 1 or len(numbers) < 3:
        return ", ".join(map(str, numbers))
    step = steps.pop()
    return f"{numbers[0]}..{numbers[-1]}" + (f" in steps of {step}" if step > 1 else "")


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]], spare: tuple[str, ...] = ()) -> None:
    """``spare`` columns are left out in this order, and said to be, while a terminal is too narrow for all."""
    from rich.console import Console
    from rich.table import Table

    # where there is no terminal there is no width either: rows stay whole, for grep and cut
    console = Console(width=None if sys.stdout.isatty() else 500)
    for left_out in range(len(spare) + 1):
        shown = [name not in spare[:left_out] for name in header]
        table = Table(box=None, pad_edge=False)
        for number, name in enumerate(header):
            if shown[number]:
                table.add_column(name, no_wrap=bool(spare) or number == 0, overflow="fold")
        for row in rows:
            table.add_row(*(str(cell) for cell, kept in zip(row, shown, strict=True) if kept))
        if console.measure(table, options=console.options.update(width=500)).maximum <= console.width:
            break
    console.print(table)
    if spare[:left_out]:
        console.print(f"in wider terminals and --json also: {', '.join(spare[:left_out])}", style="dim")
