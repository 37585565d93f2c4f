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
from tmbench.files import replace_file, writable
from tmbench_kernels import Dense, Pattern, Triangle, VerticalSlash, XAttention

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "triton",
    "flash-attn-4",
    "flash-attn-3",
    "flash-attn",
    "datasets",
    "numpy",
    "lm-eval",
)

PATTERNS: Mapping[str, Pattern] = {
    "dense": Dense(),
    "triangle": Triangle(),
    "vertical slashes": VerticalSlash(),
    "key blocks": XAttention(),
}
"""One pattern for each set of backends: those of whole key blocks share theirs."""


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
    path = root / environment.device / "environments" / f"{environment.name}.json"
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            replace_file(path, json.dumps(asdict(environment), indent=2) + "\n")
    return path


def attention_backends(device: torch.device) -> dict[str, dict[str, str]]:
    """What computes attention on this device, pattern by pattern, each tried on a small prefill: "works", or why not.

    Heads of size 128, in bfloat16 on a GPU and float32 elsewhere; "works, picked" is what such a model gets. Behind the
    backends of dense attention come the kernels that torch may choose from for the last of them, ``sdpa``.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, heads, 256, 128, device=device, dtype=dtype) for heads in (4, 2, 2))
    found = {}
    for name, pattern in PATTERNS.items():
        states = {
            backend.name: backend.obstacle(pattern, q, k, v) or _tried(partial(backend.attend, pattern, q, k, v, 0.1))
            for backend in pattern.backends
        }
        states[pattern.backend(q, k, v).name] += ", picked"
        found[name] = states
    for kernel in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        with sdpa_kernel(SDPBackend.__members__[kernel]):
            found["dense"][f"sdpa {kernel.lower()}"] = _tried(
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
    return found


def _tried(attend: Callable[[], Any]) -> str:
    """ "works", or why it does not: what a library raises is its own choice, and what it warns of is no answer."""
    try:
        with warnings.catch_warnings(action="ignore"):
            attend()
    except Exception as error:
        # torch's error is the same for every cause.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return "not on this device" if "No viable backend" in reason else reason
    return "works"


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
    root = Path(__file__).resolve().parent.parent
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
