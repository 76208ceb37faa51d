"""Clocks, power and temperature of a GPU, as they are: nothing is ever set."""

from __future__ import annotations

import subprocess
from typing import Any

_SMI_FIELDS = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


def clocks(uuid: str) -> dict[str, Any]:
    """What they are now, from nvidia-ml-py, else nvidia-smi, else a line that says why not.

    Args:
        uuid: of the GPU, ``GPU-...``: CUDA's numbers of devices are not the driver's.
    """
    try:
        return _clocks_nvml(uuid)
    except Exception as error:
        reason = f"nvidia-ml-py: {error}"
    command = ["nvidia-smi", f"--id={uuid}", "--format=csv,noheader,nounits"]
    command.append("--query-gpu=" + ",".join(_SMI_FIELDS.values()))
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return {"clocks": f"not read ({reason}; nvidia-smi: {error})"}
    return parse_smi(done.stdout)


def parse_smi(line: str) -> dict[str, Any]:
    """A line of nvidia-smi's CSV; what is not a number (``[N/A]``) stays text."""
    values = (value.strip() for value in line.strip().split(","))
    return {name: _number(value) for name, value in zip(_SMI_FIELDS, values, strict=True)}


def _number(text: str) -> float | str:
    try:
        return float(text) if text.count(".") < 2 else text
    except ValueError:
        return text


def _clocks_nvml(uuid: str) -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    try:
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        driver = pynvml.nvmlSystemGetDriverVersion()
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
            "max_sm_mhz": pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
        }
    finally:
        pynvml.nvmlShutdown()
