"""The last few frames of a video as one scene, each of them encoded once."""

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe3d_deploy.errors import InputError
from moe3d_deploy.runtime.session import Session


class SlidingWindow:
    """Runs a session whose encoder is a part of its own on the newest `views` frames.

        window = SlidingWindow(session, views=4)
        for frame in frames:              # (3, H, W) floats in [0, 1], or (H, W, 3) pixels; all of one size
            result = window.add(frame)    # of the frames of the window, the oldest first

    Every run has the cameras and the scale of its own scene, whose first view is the oldest frame.
    """

    def __init__(self, session: Session, views: int) -> None:
        if views < 1:
            raise InputError(f"a window of {views} views holds no frame; pass 1 or more")
        self._session = session
        self._tokens: deque[NDArray[np.float32]] = deque(maxlen=views)

    def add(self, frame: ArrayLike) -> dict[str, NDArray[Any]]:
        """Encode a frame, drop the oldest of a full window, and run the rest. Raises InputError as the session does."""
        tokens = self._session.encode(np.asarray(frame)[None])
        if self._tokens and self._tokens[0].shape != tokens.shape:
            here, there = ("x".join(map(str, t.shape[1:3])) for t in (tokens, self._tokens[0]))
            raise InputError(f"frame of {here} patches in a window of {there}: resize it, or begin a new window")
        self._tokens.append(tokens)
        return self._session.run_tokens(np.concatenate(self._tokens))
