"""Which form of the expert mix PyTorch runs, the kernel or PyTorch's own operators, and why. Needs no torch."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from moe3d_deploy.config import ModelConfig, MoeConfig
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.native.loading import BUILD_COMMAND, MAX_EXPERTS, WIDTH_STEP, find, load

NO_PLUGIN = "none"  # for `plugin`: PyTorch's operators, whatever libraries there are
_OF_CANDIDATES = ("expert_depths", "depth_variance")  # outputs that need each expert's own depth


@dataclass(frozen=True)
class MixChoice:
    """How the mix is computed.

    library   of the kernel, loaded and checked; None: by PyTorch's operators
    required  the user named the library: where the kernel does not run, nothing else may
    note      one line for people; None where there is nothing to choose
    """

    library: Path | None = None
    required: bool = False
    note: str | None = None

    def failed(self, reason: str) -> "MixChoice":
        """The choice after the kernel turned out not to run here. Raises Moe3dError where it was asked for."""
        if self.required:
            raise Moe3dError(f"the expert-mix kernel cannot be used: {reason}; leave the plugin out to do without it")
        return MixChoice(note=plain_note(reason))


def choose_mix(plugin: str | Path | None, config: ModelConfig, outputs: Collection[str], device_type: str) -> MixChoice:
    """What to run for this model, these outputs and this kind of device.

    plugin   path of libmoe3d_expert_mix.so, "none", or None: what `native.loading.find` finds

    Raises InputError where the kernel is asked for by path and cannot serve, and for a path that leads nowhere;
    Moe3dError for a named file that is no such library.
    """
    wanted = plugin is not None and str(plugin) != NO_PLUGIN
    if config.moe is None:
        if wanted:
            raise InputError(f"plugin {plugin}: this model has no experts, so there is nothing to mix; leave it out")
        return MixChoice()
    if plugin is not None and not wanted:
        return MixChoice(note=plain_note("as asked"))
    reason = _unsuitable(config.moe, outputs, device_type)
    if wanted:
        if reason:
            raise InputError(f"plugin {plugin}: {reason}; leave it out")
        return _with_kernel(Path(str(plugin)), required=True)
    found = find()
    if reason:
        # On a CPU this is how it always is, and worth a line only to one who has set the variable.
        tell = device_type == "cuda" or (found is not None and found.named_by is not None)
        return MixChoice(note=plain_note(reason) if tell else None)
    if found is None:
        return MixChoice(note=plain_note(f"there is no library of the kernel; build it with: {BUILD_COMMAND}"))
    if found.named_by:
        return _with_kernel(found.path, required=True)
    try:
        return _with_kernel(found.path, required=False)
    except Moe3dError as error:
        return MixChoice(note=plain_note(str(error)))


def plain_note(reason: str) -> str:
    return f"expert mix: PyTorch's operators ({reason})"


def _with_kernel(path: Path, *, required: bool) -> MixChoice:
    path = Path(os.path.abspath(path))
    load(path)
    return MixChoice(path, required, f"expert mix: the kernel in {path.name}")


def _unsuitable(moe: MoeConfig, outputs: Collection[str], device_type: str) -> str | None:
    """Why the kernel cannot serve, or None."""
    if device_type != "cuda":
        return "the kernel needs a GPU that PyTorch sees, and there is none"
    if asked := [name for name in _OF_CANDIDATES if name in outputs]:
        return f"the kernel does not keep each expert's depth, which output {asked[0]} needs"
    if moe.num_experts > MAX_EXPERTS:
        return f"the kernel mixes at most {MAX_EXPERTS} experts, this model has {moe.num_experts}"
    for width in (moe.hidden_channels, moe.gate_hidden_channels):
        if width % WIDTH_STEP:
            return f"the kernel takes widths that are multiples of {WIDTH_STEP}, this model has {width}"
    return None
