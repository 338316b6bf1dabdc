"""The names and shapes of a checkpoint's tensors against those of the model that its config makes."""

import difflib
from collections.abc import Iterable

from moe3d_deploy import strict_json
from moe3d_deploy.checkpoint_files import CONFIG_FILE, SHOWN, first_few
from moe3d_deploy.checkpoint_sizes import Contradiction, Shapes, contradictions, stored_sizes, with_sizes
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import CheckpointError, InputError
from moe3d_deploy.weight_sources import TRACK_HEAD, model_shapes

# What wrappers put before every key: DistributedDataParallel, trainers that hold the model as `self.model`, and
# torch.compile. No key of the model itself begins with one of them.
PREFIXES = ("module.", "model.", "_orig_mod.")

_LONGEST_COMPARED = 200  # characters; the search for the closest name takes time with the square of it
_PARTS = ("aggregator.", "camera_head.", "depth_head.")  # of every model; the point head may be left out


def common_prefix(names: Iterable[str]) -> str:
    """The PREFIXES, perhaps several, with which every one of `names` begins; a bare track head need not have them."""
    rest = [name for name in names if not name.startswith(TRACK_HEAD)]
    whole = ""
    while rest:
        prefix = next((p for p in PREFIXES if rest[0].startswith(p)), None)
        if prefix is None or not all(name.startswith(prefix) for name in rest):
            break
        whole += prefix
        rest = [name.removeprefix(prefix) for name in rest]
    return whole


def check_shapes(label: str, found: Shapes, config: ModelConfig) -> None:
    """Raise one CheckpointError about `label` that lists the first tensors that the model of `config` cannot take.

    Where config and tensors are of two sizes it names both, and compares the tensors with the model of their own sizes.
    """
    _refuse_half_a_prefix(label, found)
    differing, expected = _compared_with(found, config)
    unknown = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    misshapen = [name for name, shape in expected.items() if found.get(name, shape) != shape]
    others = len(differing) + len(unknown) + len(missing) + len(misshapen) - SHOWN
    if others == -SHOWN:
        return
    problems = [str(item) for item in differing[:SHOWN]]
    problems += [
        f"unknown {strict_json.show(name)}{_closest(name, missing, list(expected))}" for name in unknown[:SHOWN]
    ]
    problems += [f"missing {name!r} {expected[name]}" for name in missing[:SHOWN]]
    problems += [f"{name!r} is {found[name]}, expected {expected[name]}" for name in misshapen[:SHOWN]]
    listed = "; ".join(problems[:SHOWN]) + (f"; and {others} more" if others > 0 else "")
    raise CheckpointError(f"{label}: weights do not fit the config: {listed}. {_remedy(found, config)}")


def _compared_with(found: Shapes, config: ModelConfig) -> tuple[list[Contradiction], Shapes]:
    """In what the config and the tensors differ in size, and the shapes to compare the tensors with."""
    if not any(name.startswith(_PARTS) for name in found):
        return [], model_shapes(config)
    differing = contradictions(config, found)
    if differing:
        try:
            return differing, model_shapes(with_sizes(config, found))
        except InputError:  # the tensors are of no model, so there is no more to say than that
            return differing, found
    return differing, model_shapes(config)


def _refuse_half_a_prefix(label: str, found: Shapes) -> None:
    for prefix in PREFIXES:
        with_it = [name for name in found if name.startswith(prefix)]
        without = [name for name in found if not name.startswith(prefix)]
        if with_it and without:
            fewer = min(with_it, without, key=len)
            raise CheckpointError(
                f"{label}: {len(with_it)} of {len(found)} keys begin with {prefix!r} and the others do not "
                f"({first_few([strict_json.show(name) for name in fewer])}); save the state dict of the model alone"
            )


def _closest(name: str, missing: list[str], expected: list[str]) -> str:
    if len(name) <= _LONGEST_COMPARED:
        for known in (missing, expected):
            if matches := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
                return f" (closest known: {matches[0]!r})"
    return ""


def _remedy(found: Shapes, config: ModelConfig) -> str:
    if not any(name.startswith(_PARTS) for name in found):
        return "It holds none of VGGT's tensors: name VGGT or MoE3D weights"
    for part in _PARTS:
        if not any(name.startswith(part) for name in found):
            return f"The weights hold no {part.rstrip('.')}, which every model here has: name weights with it"
    held, wanted = stored_sizes(found)["moe.num_experts"], config.moe.num_experts if config.moe else 0
    if held == wanted:
        return f"Check the {CONFIG_FILE} beside the weights, or name weights of this architecture"
    if not held:
        return f'The weights hold no experts: set "moe" to null in {CONFIG_FILE}, then add them with moe3d convert'
    if not wanted:
        return f"The weights hold {held} experts, the config none: put their {CONFIG_FILE} beside them"
    return f"The weights hold {held} experts, the config says {wanted}: set moe.num_experts in {CONFIG_FILE}"
