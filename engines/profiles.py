"""Shape flags -> the profiles of an engine: ranges by axis, or whole shapes in trtexec's grammar; one or several.

Every flag may be repeated: then it gives one value for each profile, and a flag that is given once holds for all.
What cannot be built is refused here, before any work, with the nearest that can be.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from moe3d_deploy.engines.shapes import AXES, Shape4, ShapeProfile, parse_range
from moe3d_deploy.errors import InputError
from moe3d_deploy.manifest import PER_VIEW, SPLITS, Range, ShapeRanges

WHOLE_SHAPES = ("min_shapes", "opt_shapes", "max_shapes")
VIEW_CHUNK = 8  # views that an engine of the heads takes at a time, as VGGT's own run of them does
MOST_PROFILES = 8  # their shapes are in the engine's file name

_INPUT = "images"
_CHANNELS = 3


@dataclass(frozen=True)
class ShapeFlags:
    """The values of the flags as they were given, in their order; empty where a flag was not.

    batch, views, height, width          value, min:max or min:opt:max
    min_shapes, opt_shapes, max_shapes   images:1x2x3x392x518 (B x S x 3 x H x W), or 1x2x392x518x3 for 8-bit pixels
    """

    batch: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    height: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    min_shapes: tuple[str, ...] = ()
    opt_shapes: tuple[str, ...] = ()
    max_shapes: tuple[str, ...] = ()


def read_profiles(
    flags: ShapeFlags, accepted: ShapeRanges, patch_size: int, img_size: int, *, channels_last: bool = False
) -> tuple[ShapeProfile, ...]:
    """The profiles that the flags ask for; without any, the default one, or what the file fixes.

    accepted        what the ONNX file takes
    img_size        pixels of the model's usual side, the largest by default; the smallest is 10 patches
    channels_last   the file takes 8-bit pixels, (B, S, H, W, 3)

    Raises InputError for what cannot be built, with the flag, the reason and the nearest that can.
    """
    given = {field.name: values for field in fields(flags) if (values := getattr(flags, field.name))}
    count = max(map(len, given.values()), default=1)
    for name, values in given.items():
        if len(values) not in (1, count):
            most = next(other for other, found in given.items() if len(found) == count)
            raise InputError(
                f"{_flag(name)} is given {len(values)} times and {_flag(most)} {count} times: give a shape flag once "
                "for all profiles, or once for each"
            )
    if count > MOST_PROFILES:
        raise InputError(f"{count} profiles are more than the {MOST_PROFILES} an engine may have here: build several")
    whole = [name for name in WHOLE_SHAPES if name in given]
    if whole and (mixed := [name for name in AXES if name in given]):
        raise InputError(f"{_flag(whole[0])} says all sizes: leave {_flag(mixed[0])} out, or give ranges alone")
    profiles: list[ShapeProfile] = []
    for index in range(count):
        texts = {name: values[index if len(values) > 1 else 0] for name, values in given.items()}
        if whole:
            profile = _of_whole_shapes(texts, accepted, patch_size, channels_last)
        else:
            profile = _of_ranges(texts, accepted, patch_size, img_size)
        if profile in profiles:
            raise InputError(f"profile {index + 1} is the same as profile {profiles.index(profile) + 1}: leave it out")
        profiles.append(profile)
    return tuple(profiles)


def engines_of(
    split: str | None, profiles: Sequence[ShapeProfile], view_chunk: int | None = None
) -> dict[str | None, tuple[ShapeProfile, ...]]:
    """What is built for runs of a model with `profiles`: the profiles of each part by its role, of one file by None.

    view_chunk   views that the heads take at a time, where they are a part; None: VIEW_CHUNK

    Raises InputError for a chunk where the heads are none.
    """
    if view_chunk is not None and split != "heads":
        raise InputError(
            f"--view-chunk {view_chunk}: the heads are no part of this model (--split heads): leave it out"
        )
    if split is None:
        return {None: tuple(profiles)}
    return {role: of_part(role, profiles, view_chunk or VIEW_CHUNK) for role in SPLITS[split]}


def of_any_views(accepted: ShapeRanges, role: str) -> ShapeRanges:
    """What a part takes where the model takes `accepted`: one that is per view takes any number of views."""
    if role not in PER_VIEW:
        return accepted
    return replace(accepted, batch=Range(1, None), views=Range(1, None))


def of_part(role: str, profiles: Sequence[ShapeProfile], view_chunk: int) -> tuple[ShapeProfile, ...]:
    """The profiles of a part's engine, for a run of the whole model with `profiles`.

    A part that is per view gets the views of all scenes as those of one, from a single one on: the heads at most
    `view_chunk` of them, which they are tuned for; the encoder all.
    """
    if role not in PER_VIEW:
        return tuple(profiles)
    found = []
    for profile in profiles:
        typical, most = profile.opt[0] * profile.opt[1], profile.max[0] * profile.max[1]
        if role == "heads":
            typical = most = min(view_chunk, most)
        low, middle, high = profile.min[2:], profile.opt[2:], profile.max[2:]
        found.append(ShapeProfile((1, 1, *low), (1, typical, *middle), (1, most, *high), profile.patch_size))
    return tuple(dict.fromkeys(found))


def _of_ranges(texts: dict[str, str], accepted: ShapeRanges, patch_size: int, img_size: int) -> ShapeProfile:
    sides = f"{min(10 * patch_size, img_size)}:{img_size}"
    chosen = []
    for axis, default in zip(AXES, ("1", "1:2:8", sides, sides), strict=True):
        given, allowed = texts.get(axis), getattr(accepted, axis)
        fixed = str(allowed.min) if allowed.min == allowed.max else None
        if given and fixed and set(given.split(":")) != {fixed}:
            raise InputError(f"--{axis} {given}: the file fixes {axis} at {fixed} (--static), leave --{axis} out")
        chosen.append(given or fixed or default)
    batch, views, height, width = chosen
    profile = ShapeProfile.from_ranges(batch, views, height, width, patch_size)
    for axis, text in zip(AXES, chosen, strict=True):
        for value in parse_range(axis, text):
            if fault := _fault(axis, value, getattr(accepted, axis)):
                raise InputError(f"--{axis} {text}: {fault}; nearest is {_nearest(value, getattr(accepted, axis))}")
    return profile


def _of_whole_shapes(
    texts: dict[str, str], accepted: ShapeRanges, patch_size: int, channels_last: bool
) -> ShapeProfile:
    """A shape that is left out is, as in trtexec, the next one that is given: opt for both ends, max for opt."""
    shapes = {name: _shape(name, text, accepted, channels_last) for name, text in texts.items()}
    low, typical, high = (shapes.get(name) for name in WHOLE_SHAPES)
    smallest, largest = low or typical or high, high or typical or low
    typical = typical or largest
    if smallest is None or typical is None or largest is None:
        raise InputError(f"none of {', '.join(map(_flag, WHOLE_SHAPES))} is given")
    order = [sorted(sizes) for sizes in zip(smallest, typical, largest, strict=True)]
    for axis, *sizes in zip(AXES, smallest, typical, largest, strict=True):
        if sizes != sorted(sizes):
            said = " ".join(f"{_flag(name)} {text}" for name, text in texts.items())
            ordered: list[Shape4] = [(b, s, h, w) for b, s, h, w in zip(*order, strict=True)]
            nearest = " ".join(
                f"{_flag(name)} {_text(shape, channels_last)}"
                for name, shape in zip(WHOLE_SHAPES, ordered, strict=True)
                if name in texts
            )
            raise InputError(f"{said}: {axis} must rise, min <= opt <= max; in order: {nearest}")
    return ShapeProfile(smallest, typical, largest, patch_size)


def _shape(name: str, text: str, accepted: ShapeRanges, channels_last: bool) -> Shape4:
    """Read `images:1x2x3x392x518`, with or without the input's name."""
    form = _text((1, 2, 392, 518), channels_last)
    given, _, sizes = text.rpartition(":")
    if given not in ("", _INPUT):
        raise InputError(f"{_flag(name)} {text}: there is no input {given!r}; the model takes {_INPUT}, as {form}")
    if "," in text or not re.fullmatch("[0-9]{1,6}(x[0-9]{1,6}){4}", sizes):
        raise InputError(f"{_flag(name)} {text!r}: expected the 5 sizes of {_INPUT}, as {form}")
    numbers = [int(size) for size in sizes.split("x")]
    if numbers.pop(4 if channels_last else 2) != _CHANNELS:
        order = "B x S x H x W x 3" if channels_last else "B x S x 3 x H x W"
        raise InputError(f"{_flag(name)} {text}: the model takes {order}, as {form}")
    faults = [fault for axis, size in zip(AXES, numbers, strict=True) if (fault := _fault_of(axis, size, accepted))]
    if faults:
        b, s, h, w = (_nearest(size, getattr(accepted, axis)) for axis, size in zip(AXES, numbers, strict=True))
        raise InputError(f"{_flag(name)} {text}: {', '.join(faults)}; nearest is {_text((b, s, h, w), channels_last)}")
    batch, views, height, width = numbers
    return batch, views, height, width


def _fault_of(axis: str, size: int, accepted: ShapeRanges) -> str:
    fault = _fault(axis, size, getattr(accepted, axis))
    return f"{axis} {fault}" if fault else ""


def _fault(axis: str, value: int, allowed: Range) -> str:
    """Why the file does not take `value` on this axis; empty where it does."""
    if value < 1:
        return f"{value} is less than 1"
    if allowed.min == allowed.max != value:
        return f"{value} is not the {allowed.min} that the file fixes (--static)"
    if axis in ("height", "width") and (value - allowed.min) % allowed.step:
        return f"{value} is not a multiple of the patch size {allowed.step}"
    if value < allowed.min or (allowed.max is not None and value > allowed.max):
        most = "and more" if allowed.max is None else f"to {allowed.max}"
        return f"{value} is not what the file takes, {allowed.min} {most}"
    return ""


def _nearest(value: int, allowed: Range) -> int:
    """The nearest value that `allowed` has; of two that are as near, the larger."""
    steps = max(0, (value - allowed.min + allowed.step // 2) // allowed.step)
    if allowed.max is not None:
        steps = min(steps, (allowed.max - allowed.min) // allowed.step)
    return allowed.min + steps * allowed.step


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _text(shape: Sequence[int], channels_last: bool) -> str:
    sizes = [*map(str, shape)]
    sizes.insert(4 if channels_last else 2, str(_CHANNELS))
    return f"{_INPUT}:{'x'.join(sizes)}"
