"""Which distribution brings a module, and whether it is installed: from package metadata, nothing is imported."""

import importlib.metadata

# Other distributions that bring the same module, so that the named one is not needed beside them.
SUBSTITUTES = {
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
    "onnxruntime": ("onnxruntime-gpu",),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12"),
}


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed(distribution: str) -> str | None:
    """`distribution`, or of its substitutes the first that is installed; None without any."""
    names = (distribution, *SUBSTITUTES.get(distribution, ()))
    return next((name for name in names if version_of(name) is not None), None)


def reinstall(distribution: str) -> str:
    """The command that mends a library that is installed and does not load: that distribution alone, under the name
    it was installed by. An extra of this project would install torch and all else again.
    """
    return f"pip install --force-reinstall {installed(distribution) or distribution}"
