"""What a camera does to light: exposure, white balance, vignetting, blur, noise. Depth is untouched."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_SAMPLE = 7  # every such pixel decides the exposure
_BRIGHT = 0.95  # the share of pixels that is not to saturate


def exposed(light: Tensor, target: float) -> Tensor:
    """Scale linear light (S, 3, H, W) so that its median becomes `target`, or less where highlights would saturate."""
    brightness = light.amax(dim=1).reshape(-1)[::_SAMPLE].sort().values
    median, bright = (float(brightness[int(share * (len(brightness) - 1))]) for share in (0.5, _BRIGHT))
    return light * min(target / max(median, 1e-6), 0.95 / max(bright, 1e-6))


def camera_effects(light: Tensor, rng: np.random.Generator) -> Tensor:
    """Linear light (S, 3, H, W) as the cameras of one scene see it, still linear."""
    views, _, height, width = light.shape
    balance = rng.uniform(0.88, 1.12, (1, 3)) * rng.uniform(0.9, 1.1, (views, 1))
    u, v = np.arange(width) - width / 2, np.arange(height) - height / 2
    radius2 = (u**2 + v[:, None] ** 2) / (width**2 / 4 + height**2 / 4)
    falloff = 1 - rng.uniform(0, 0.35) * radius2
    gain = torch.from_numpy((balance[:, :, None, None] * falloff).astype(np.float32)).to(light.device)
    return _blurred(light * gain, float(rng.uniform(0.06, 0.2)))


def noisy(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """A picture (S, 3, H, W) in 0..1 with the noise of a sensor, which is stronger where it is bright."""
    dark, bright = rng.uniform(0, 0.012), rng.uniform(0, 0.02)
    values = rng.standard_normal(picture.shape, np.float32)
    return picture + torch.from_numpy(values).to(picture.device) * (dark + bright * picture)


def _blurred(picture: Tensor, side: float) -> Tensor:
    """The filter (side, 1 - 2 side, side) along both axes."""
    wide = pad(picture, (1, 1, 0, 0), mode="replicate")
    picture = (1 - 2 * side) * picture + side * (wide[..., :-2] + wide[..., 2:])
    tall = pad(picture, (0, 0, 1, 1), mode="replicate")
    return (1 - 2 * side) * picture + side * (tall[..., :-2, :] + tall[..., 2:, :])
