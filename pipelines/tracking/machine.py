"""How busy the driver's machine is, under the names that MLflow's page of system metrics looks for."""

from __future__ import annotations

MEGABYTE = 1e6


def machine_metrics() -> dict[str, float]:
    """CPU, since the last call, and memory of this machine, all of its processes together."""
    import psutil  # of no use to a process that does not track

    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
    }
