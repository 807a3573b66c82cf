# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Says on which machine, and with which versions, numbers were taken."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def header(device: str) -> str:
    """Writes where the numbers come from."""
    facts = provenance(device)
    about = "GPU numbers" if device == "cuda" else f"CPU numbers, {facts['threads']} threads"
    return f"{facts['device']} ({about}); torch {facts['torch']}; commit {facts['commit']}"


def provenance(device: str) -> dict[str, str | int]:
    """Returns the device and the versions that the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def cpu_name() -> str:
    """Names model, cores and the instruction set that torch found: a VM may hide the model."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    name = model[1] if model else platform.processor() or platform.machine()
    isa = torch.backends.cpu.get_cpu_capability()
    if re.search(r"\bavx512_bf16\b", cpuinfo):
        isa += " with BF16"
    return f"{name}, {os.cpu_count()} cores, {isa}"


def commit() -> str:
    """Returns the commit of the working tree, marked where the tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        check=False,  # a copy without git is no error
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"
