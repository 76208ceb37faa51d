"""``specrt info``."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from specrt.device import Device


def collect(target: str | None = None) -> dict[str, Any]:
    """Everything a bug report needs, and of a target, if one is named, what its files hold.

    Raises:
        CheckpointError: it cannot be read.
    """
    import torch

    import specrt
    from specrt.ops.build import build_info
    from specrt.ops.threads import worker_cpus
    from specrt.targets import PACKAGED

    build = build_info()
    return {
        "specrt": specrt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _package_version("transformers"),
        "build": {
            "version": build.version,
            "compiler": build.compiler,
            "cuda": build.cuda,
            "cuda_archs": build.cuda_archs,
            "needs": build.least_driver,
        },
        "cpu": cpu_model(),
        "instruction_sets": list(build.cpu_isas),
        "active_instruction_set": build.active_isa,
        "refused_instruction_set": build.refused_isa,
        "threads": torch.get_num_threads(),
        "worker_cpus": worker_cpus(),
        **_nvidia(),
        "bundled": _bundled(),
        "packaged": {name: _found(packaged.find()) for name, packaged in PACKAGED.items()},
        "target": None if target is None else _target(target),
    }


def show(facts: dict[str, Any], *, is_json: bool) -> None:
    """Print them, for people or as one JSON object."""
    if is_json:
        print(json.dumps(facts))
        return
    from specrt.targets import how_to_install

    build = facts["build"]
    cuda, driver = "not built", facts["driver"] or "none found"
    if build["cuda"]:
        cuda = f"{build['cuda']} for {build['cuda_archs']}; they need {build['needs']}"
    sets = ", ".join(
        f"{name} (active)" if name == facts["active_instruction_set"] else name
        for name in facts["instruction_sets"]
    )
    refused = facts["refused_instruction_set"]
    bundled = map(_bundled_line, facts["bundled"])
    rows = {
        "specrt": facts["specrt"],
        "python": facts["python"],
        "torch": facts["torch"],
        "transformers": facts["transformers"] or "not installed",
        "compiler": build["compiler"],
        "CUDA kernels": cuda,
        "CPU": facts["cpu"],
        "instruction sets": f"{sets}\n{refused}" if refused else sets,
        "threads": f"{facts['threads']}, {_placed(facts['worker_cpus'])}",
        "driver": driver,
        "GPUs": "\n".join(facts["gpus"]) or "none found",
        "bundled models": "\n".join(bundled) or "none",
        **{name: file or how_to_install(name) for name, file in facts["packaged"].items()},
    }
    if facts["target"]:
        stored = facts["target"]["bytes"]
        sizes = ", ".join(f"{form} {size / 1e6:.1f} MB" for form, size in stored.items())
        rows["target"] = f"{facts['target']['name']}  {sizes}"
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False, markup=False, emoji=False, soft_wrap=True).print(table)


def _found(file: Path | None) -> str | None:
    return None if file is None else str(file)


def _target(target: str) -> dict[str, Any]:
    """A target's name, and bytes of its tensors by what they are stored as."""
    from specrt.cli.engine_options import target_directory
    from specrt.models.opening import stored_bytes

    directory, name = target_directory(target)
    return {"name": name, "bytes": stored_bytes(directory)}


def machine_of(device: Device) -> str:
    """What a target runs on, by name: its GPU, or the CPU and the number of threads."""
    import torch

    if device.is_gpu:
        return torch.cuda.get_device_name(device.place)
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def _placed(cpus: list[int]) -> str:
    """``kept on CPUs 0-7, 16``, or that the system places them."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    shown = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"kept on CPUs {', '.join(shown)}" if cpus else "placed by the system"


def cpu_model() -> str:
    """The CPU's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia() -> dict[str, Any]:
    """The driver's release and the CUDA it is of; names and memory of the GPUs."""
    nothing: dict[str, Any] = {"driver": None, "gpus": []}
    try:
        import pynvml
    except ImportError:
        return nothing
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return nothing
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        gpus = [_gpu(pynvml, handle) for handle in handles]
        return {"driver": _driver(pynvml), "gpus": gpus}
    except pynvml.NVMLError:
        return nothing
    finally:
        pynvml.nvmlShutdown()


def _driver(pynvml: Any) -> str:
    cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    return f"{pynvml.nvmlSystemGetDriverVersion()} of CUDA {cuda // 1000}.{cuda % 1000 // 10}"


def _gpu(pynvml: Any, handle: Any) -> str:
    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
    return f"{name}, {memory / 2**30:.0f} GiB"


def _bundled() -> list[dict[str, Any]]:
    """The models that come with the package, with the size of their files; a drafter's target."""
    from specrt import builtin

    found: list[tuple[str, str | None, Path]] = [("target", None, builtin.target_path())]
    found += [(one.name, one.target, one.path) for one in builtin.drafters()]
    models = []
    for name, target, directory in found:
        data = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        files = [file for file in directory.iterdir() if file.is_file()]
        models.append(
            {
                "name": name,
                "kind": data.get("drafter") or data.get("model_type", "unknown"),
                "target": target,
                "bytes": sum(file.stat().st_size for file in files),
            }
        )
    return models


def _bundled_line(model: dict[str, Any]) -> str:
    made_for = f", for {model['target']}" if model["target"] else ""
    return f"{model['name']}  {model['bytes'] / 1e6:.1f} MB  {model['kind']}{made_for}"
