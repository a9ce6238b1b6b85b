"""`kvern doctor`: what this machine is, what computes here, how much fits, and what would make it faster.

One report is built as plain data; `--json` prints it, otherwise it becomes tables. With --model it starts with that
model's numbers, among them the latent cache beside what multi-head attention with the same heads would keep (keys and
values of v_head_dim numbers each, BF16).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kvern.config import ModelConfig
    from kvern.engine.dtype import Choice
    from kvern.plan.hardware import Machine

HELP = "describe this machine, and what would make it faster"
EXAMPLES = """\
kvern doctor
kvern doctor --model deepseek-v3
kvern doctor --model ./my-model --json
"""

Report = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--model", metavar="NAME|FOLDER", help="a known configuration, a pulled model or a folder")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report to stdout."""
    report = make_report(args.model)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0


def make_report(model: str | None) -> Report:
    """Machine, kernels, measured dtypes and advice; with `model` its account on top, otherwise those of all known."""
    from kvern.engine.dtype import choose
    from kvern.plan.hardware import machine

    here = machine()
    configs = {model: find_config(model)} if model else known_configs()
    measured = model or next(iter(configs))
    top = _account(configs[model], here) if model else {"models": {n: _account(c, here) for n, c in configs.items()}}
    return {
        **({"model": model} if model else {}),
        **top,
        "machine": _machine(here),
        "kernels": _kernels(),
        "dtype": {"model": measured, **_dtype(choose(configs[measured]))},
        "advice": advice(here),
    }


def find_config(name: str) -> ModelConfig:
    """The configuration of a folder, of a well-known model, or of a pulled one. Raises NotFoundError with a hint."""
    from kvern.checkpoint.local import ensure_imported
    from kvern.config import ModelConfig, known_configurations

    if not Path(name).expanduser().exists() and name in known_configurations():
        return ModelConfig.named(name)
    return ModelConfig.load(ensure_imported(name))


def known_configs() -> dict[str, ModelConfig]:
    """Imported models first, then the configurations that ship with Kvern."""
    from kvern.checkpoint.local import cache_folder
    from kvern.config import ModelConfig, known_configurations

    folders = sorted((cache_folder() / "models").glob("*/config.json"))
    imported = {path.parent.name: ModelConfig.load(path.parent) for path in folders}
    return imported | {name: ModelConfig.named(name) for name in known_configurations()}


def advice(machine: Machine) -> list[str]:
    """What would make this machine faster; empty when nothing is left to do."""
    import torch

    from kvern.ops import library

    found = []
    if (reason := library.why_absent()) is not None:
        found.append(f"{reason}: install g++ and reinstall kvern, decoding becomes several times faster")
    elif library.isa() != (best := _best_isa(machine.isa)):
        found.append(f"the kernels run as {library.isa()}, this CPU could run {best}: unset KVERN_ISA")
    elif best == "avx2":
        found.append("this CPU has AVX2 and no AVX-512: FP8 weights decode at about half the speed, BF16 ones do not")
    threads = library.threads() if library.library() else torch.get_num_threads()
    if threads < machine.usable_cores:
        found.append(f"{threads} of {machine.usable_cores} cores are used: raise OMP_NUM_THREADS, or unset it")
    if machine.usable_cores < machine.logical_cores:
        found.append(f"a container or affinity limit leaves {machine.usable_cores} of {machine.logical_cores} cores")
    return found


def _best_isa(flags: Iterable[str]) -> str:
    have = set(flags)
    if {"avx512f", "avx512bw", "avx512vl", "avx512vbmi"} <= have:
        if "avx512_bf16" not in have:
            return "avx512"
        return "amx" if {"amx_bf16", "amx_tile"} <= have else "avx512bf16"
    return "avx2" if {"avx2", "fma", "f16c"} <= have else "scalar"


def _account(config: ModelConfig, machine: Machine) -> Report:
    from kvern.plan.memory import account

    counted = account(config)
    return {
        "parameters": counted.parameters,
        "active_parameters": counted.active_parameters,
        "latent_bytes_per_token": counted.latent_bytes_per_token,
        "latent8_bytes_per_token": counted.latent8_bytes_per_token,
        "mha_bytes_per_token": counted.mha_bytes_per_token,
        "checkpoint_bytes": counted.checkpoint_bytes,
        "fits_in_memory": counted.checkpoint_bytes <= machine.memory_available,
    }


def _machine(machine: Machine) -> Report:
    from dataclasses import asdict

    return {**asdict(machine), "isa": list(machine.isa)}


def _kernels() -> Report:
    from kvern import ops
    from kvern.ops import library

    return {
        "native": library.isa(),
        "threads": library.threads(),
        "why_absent": library.why_absent(),
        "ops": {op.name: op.backend("cpu") for op in ops.ALL},
    }


def _dtype(choice: Choice) -> Report:
    return {
        "activations": _dtype_name(choice.activation_dtype),
        "weights": _dtype_name(choice.weight_dtype),
        "measured": [
            {
                "activations": _dtype_name(one.form.activations),
                "weights": _dtype_name(one.form.weights),
                "chosen": (one.form.activations, one.form.weights) == (choice.activation_dtype, choice.weight_dtype),
                "shape": [one.outputs, one.inputs],
                "one_row_us": one.one_row,
                "sixteen_rows_us": one.sixteen_rows,
                "left_out": one.left_out,
            }
            for one in choice.measurements
        ],
    }


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "as stored" if dtype is None else str(dtype).removeprefix("torch.")


def _print(report: Report) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print("[bold]kvern doctor[/bold]")
    if "model" in report:
        _print_facts(console, report["model"], _account_facts(report))
    _print_facts(console, "Machine", _machine_facts(report["machine"]))
    kernels = report["kernels"]
    native = f"{kernels['native']}, {kernels['threads']} threads" if kernels["native"] else kernels["why_absent"]
    _print_facts(console, "Kernels", {"native": native, **kernels["ops"]})
    _print_dtypes(console, report["dtype"])
    if "models" in report:
        _print_models(console, report["models"])
    console.print("\n[bold]What would make it faster[/bold]")
    for line in report["advice"] or ["nothing that kvern knows of"]:
        console.print(f"  {line}", soft_wrap=True, markup=False)


def _account_facts(report: Report) -> dict[str, str]:
    latent, heads = report["latent_bytes_per_token"], report["mha_bytes_per_token"]
    fp8 = report["latent8_bytes_per_token"]
    return {
        "parameters": f"{report['parameters']:,}",
        "active a token": f"{report['active_parameters']:,} (head counted, embedding not)",
        "latent cache": f"{latent:,} bytes a token (BF16), {fp8:,} with --cache-dtype fp8",
        "as multi-head": f"{heads:,} bytes a token with the same heads: {heads / latent:.1f} times more",
        "checkpoint": f"{_size(report['checkpoint_bytes'])}, {_fits(report)}",
    }


def _fits(report: Report) -> str:
    return "fits into memory" if report["fits_in_memory"] else "larger than the memory available: read from disk"


def _machine_facts(machine: Report) -> dict[str, str]:
    return {
        "processor": machine["cpu"],
        "cores": f"{machine['usable_cores']} usable, {machine['logical_cores']} logical, {machine['physical_cores']} "
        f"physical, {machine['numa_nodes']} NUMA node(s)",
        "instructions": " ".join(machine["isa"]) or "unknown",
        "memory": f"{_size(machine['memory_available'])} available of {_size(machine['memory_total'])}",
    }


def _print_facts(console: Any, title: str, facts: dict[str, str]) -> None:
    console.print(f"\n[bold]{title}[/bold]")
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        console.print(f"  {name:<{width}}{value}", soft_wrap=True, markup=False)


def _print_dtypes(console: Any, dtype: Report) -> None:
    from rich.table import Table

    outputs, inputs = dtype["measured"][0]["shape"]
    console.print(f"\n[bold]Dtype[/bold] for {dtype['model']}, a {outputs} x {inputs} product measured now")
    table = Table("activations", "weights", "1 row, us", "16 rows, us", "", box=None, pad_edge=False, padding=(0, 2))
    for one in dtype["measured"]:
        times = ("-", "-", one["left_out"])
        if not one["left_out"]:
            times = (f"{one['one_row_us']:.0f}", f"{one['sixteen_rows_us']:.0f}", "chosen" if one["chosen"] else "")
        table.add_row(one["activations"], one["weights"], *times)
    console.print(table)


def _print_models(console: Any, models: dict[str, Report]) -> None:
    from rich.table import Table

    console.print(
        "\n[bold]Models[/bold], caches in bytes a token: latent beside the same heads as multi-head", soft_wrap=True
    )
    header = ("model", "parameters", "active", "latent", "multi-head", "checkpoint", "fits")
    table = Table(*header, box=None, pad_edge=False, padding=(0, 1))
    for name, one in models.items():
        counts = [f"{one[key] / 1e9:.2f} B" for key in ("parameters", "active_parameters")]
        caches = [f"{one[key]:,}" for key in ("latent_bytes_per_token", "mha_bytes_per_token")]
        fits = "yes" if one["fits_in_memory"] else "no"
        table.add_row(name, *counts, *caches, _size(one["checkpoint_bytes"]), fits)
    console.print(table)


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
