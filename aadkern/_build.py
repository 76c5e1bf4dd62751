"""What the installation built, as told by the optional module ``aadkern._host``; run as a script it prints that."""

from __future__ import annotations

from typing import Any

NOT_BUILT = (
    "aadkern._host is not built: there was no working C++ compiler when aadkern was installed. Only these build facts "
    "need it. To build it: install a C++17 compiler, then `pip install -v .`"
)


def build_info() -> dict[str, Any] | None:
    """Facts fixed at build time, or None where the host module was not built (``NOT_BUILT`` says what that means).

    Keys: version (of the sources that were built), compiler, cxx_standard (int), build_type, cuda_compiler (str, or
    None: none found or not looked for), cuda_architectures (tuple of str, empty where no CUDA kernel was built).
    """
    try:
        from aadkern import _host  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        return None
    info: dict[str, Any] = _host.build_info()
    return info


def describe() -> str:
    """The same in one line."""
    info = build_info()
    if info is None:
        return f"WARNING: {NOT_BUILT}"
    architectures = ", ".join(info["cuda_architectures"]) or "none built"
    return (
        f"aadkern {info['version']}: host module by {info['compiler']}, C++{info['cxx_standard']}, "
        f"{info['build_type']}; CUDA compiler: {info['cuda_compiler'] or 'none'}; CUDA kernels: {architectures}"
    )


if __name__ == "__main__":
    print(describe())
