"""Makes Triton's JIT believe that a GPU is there, so that launches compile into the cache and run nothing.

What the JIT would build on the GPU's machine is built here, the C launchers included, with its own code; only what
would touch a GPU is replaced. Where there is no driver library, an empty one takes its place in linking.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

SHARED_MEMORY = 232448  # bytes that a block of an H100 can use


def stub_libcuda(folder: Path) -> Path:
    """A libcuda.so.1 with the functions that Triton's C code names; none of them may be called."""
    home = Path(nvidia.__file__).parent  # the launchers' C code is a template in driver.py
    source = (home / "driver.c").read_text() + (home / "driver.py").read_text()
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\s*\()", source)))
    code, library = folder / "libcuda.c", folder / "libcuda.so.1"
    code.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in names))
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, code], check=True)
    (folder / "libcuda.so").symlink_to(library)
    return library


def _find_libcuda() -> None:
    """Use the machine's libcuda if there is one, else a stub."""
    nvidia.libcuda_dirs.cache_clear()
    nvidia.library_dirs.cache_clear()
    try:
        nvidia.libcuda_dirs()
    except (AssertionError, OSError, subprocess.CalledProcessError):
        folder = Path(tempfile.mkdtemp(prefix="libcuda"))
        ctypes.CDLL(str(stub_libcuda(folder)), mode=ctypes.RTLD_GLOBAL)  # what is linked against it finds it loaded
        triton.knobs.nvidia.libcuda_path = str(folder)
        nvidia.libcuda_dirs.cache_clear()
        nvidia.library_dirs.cache_clear()


class _Utils:
    """Triton's own utilities, but for what needs a device."""

    def __init__(self) -> None:
        self._real = nvidia.CudaUtils()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher(nvidia.CudaLauncher):
    """Builds what a launch needs; does not launch."""

    def __call__(self, *arguments: object) -> None:
        return


class PretendedDriver(nvidia.CudaDriver):
    """A GPU of one architecture, on which nothing runs."""

    def __init__(self, arch: str) -> None:
        _find_libcuda()
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        self.utils = _Utils()
        self.launcher_cls = _Launcher
        self.get_device_capability = lambda device=0: divmod(self.target.arch, 10)
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend(arch: str) -> None:
    """From now on, in this process, launches compile for ``arch`` and run nothing."""
    driver.set_active(PretendedDriver(arch))
