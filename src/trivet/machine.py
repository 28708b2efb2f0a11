"""The machine a number was measured on: what it is, and the one setting that makes it faster."""

from __future__ import annotations

import ctypes
import datetime as dt
import importlib.metadata
import os
import platform
import shlex
import sys
from typing import Any


def keep_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the kernel at every step.

    Page faults on large temporaries cost a factor of 1.4 to 2.2 in training steps on a CPU; freed memory stays
    with the process. Only programs call this (the command line, the benchmarks), never the library on import.
    Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_mmap_max, m_trim_threshold, m_top_pad = -4, -1, -2
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 1 << 28)


def describe() -> dict[str, Any]:
    """Everything a reader needs to judge a measurement: processor, threads, versions, command, date (UTC)."""
    import torch

    versions = {"python": platform.python_version()}
    for package in ("trivet", "torch", "numpy", "scipy", "onnxruntime"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {
        "command": shlex.join(["trivet", *sys.argv[1:]]) if sys.argv[0].endswith("trivet") else shlex.join(sys.argv),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions,
    }


def processor() -> str:
    """The processor's name with the matrix instructions that decide its speed."""
    try:
        with open("/proc/cpuinfo") as handle:
            lines = handle.read().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    notable = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if flag in flags]
    return " ".join([fields.get("model name", platform.machine()), *notable])
