"""What a measurement ran on: device, driver, versions and commit. Every row carries it, and bug reports want it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tmbench import __version__
from tmbench.results.files import read_file, readable, replace_file, writable

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "triton",
    "flash-attn-4",
    "flash-attn-3",
    "flash-attn",
    "flash-linear-attention",
    "mamba-ssm",
    "causal-conv1d",
    "accelerate",
    "gguf",
    "gptqmodel",
    "optimum",
    "compressed-tensors",
    "bitsandbytes",
    "kernels",
    "datasets",
    "numpy",
    "lm-eval",
)


@dataclass(frozen=True)
class Environment:
    """One machine, device and set of versions."""

    device: str
    """The name of the device's folder among the results."""
    device_name: str
    driver: str
    threads: int
    """CPU threads that torch uses; 0 where the device is not the CPU."""
    cores: int
    memory_bytes: int
    """Of the GPU, or of the machine where the device is its CPU."""
    system: str
    python: str
    tmbench: str
    commit: str
    dirty: bool
    packages: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A short name that changes with anything above."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def row_fields(self) -> dict[str, str | int | bool]:
        """The columns that a result row takes from here."""
        return {
            "device": self.device,
            "device_name": self.device_name,
            "driver": self.driver,
            "threads": self.threads,
            "tmbench": self.tmbench,
            "commit": self.commit,
            "dirty": self.dirty,
            "python": self.python,
            "torch": self.packages.get("torch", ""),
            "triton": self.packages.get("triton", ""),
            "transformers": self.packages.get("transformers", ""),
            "environment": self.name,
        }


def current(device: torch.device) -> Environment:
    """The environment of a run on this torch device."""
    device_name, driver, memory = _device(device)
    device_name = " ".join(device_name.split())  # older processors fill theirs up with spaces
    commit, dirty = source_state()
    return Environment(
        device=_folder(device_name, device),
        device_name=device_name,
        driver=driver,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        cores=os.cpu_count() or 1,
        memory_bytes=memory,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        tmbench=__version__,
        commit=commit,
        dirty=dirty,
        packages=_versions(),
    )


def write_record(root: Path, environment: Environment) -> Path:
    """Keep the whole environment beside the CSVs whose rows name it."""
    path = _record_path(root, environment.device, environment.name)
    _write_once(path, json.dumps(asdict(environment), indent=2) + "\n")
    return path


def copy_record(source: Path, root: Path, device: str, name: str) -> None:
    """Keep an environment of another results folder beside the rows that name it; raises UserError where it cannot be."""
    path = _record_path(source, device, name)
    with readable(path):
        content = read_file(path)
    _write_once(_record_path(root, device, name), content)


def _record_path(root: Path, device: str, name: str) -> Path:
    return root / device / "environments" / f"{name}.json"


def _write_once(path: Path, content: str | bytes) -> None:
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            replace_file(path, content)


def _device(device: torch.device) -> tuple[str, str, int]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, _nvidia_driver(), int(properties.total_memory)
    import psutil

    return f"{_processor()}, {os.cpu_count()} cores", "", int(psutil.virtual_memory().total)


def _nvidia_driver() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _folder(device_name: str, device: torch.device) -> str:
    name = device_name if device.type == "cuda" else f"cpu {device_name}"
    name = re.sub(r"\((r|tm)\)|@.*?ghz|\bprocessor\b|\bcpu\b(?!\s)", "", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-.")


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def source_state() -> tuple[str, bool]:
    """The commit that tmbench's own source is at and whether it was edited since; ("", False) outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "", False
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    # Result files are what a run makes, not what made it.
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!demo")
    return commit, bool(changed)


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
