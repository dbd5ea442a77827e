"""What pyproject.toml cannot say: which folders the packages are in."""

from setuptools import find_packages, setup

setup(
    # kernels/ lies at the top level of the checkout, but its plain name belongs to a package of
    # Hugging Face's: it is only importable as vllm_adadecode.kernels. It has no __init__.py, lest a
    # checkout on the path takes that name; so it is not found.
    packages=[
        *find_packages(include=["vllm_adadecode", "vllm_adadecode.*"]),
        "vllm_adadecode.kernels",
    ],
    package_dir={"vllm_adadecode.kernels": "kernels"},
)
