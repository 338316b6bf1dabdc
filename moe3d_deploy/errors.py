"""The errors this project raises. Each message is one line: what is wrong with which input, and what to do."""


class Moe3dError(Exception):
    """Base class; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(Moe3dError):
    """An argument, image or shape that cannot be used."""

    exit_code = 2


class CheckpointError(Moe3dError):
    """Weights or their config that cannot be used."""

    exit_code = 2


class BundleError(Moe3dError):
    """A bundle folder that is missing, damaged or not of a format this version reads."""

    exit_code = 2


class ExportError(Moe3dError):
    """An export that failed or did not pass its verification."""


class EngineError(Moe3dError):
    """An engine that cannot be built, loaded or run."""


class MissingExtraError(Moe3dError):
    """A package of an optional extra that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'moe3d-deploy[{extra}]'")
