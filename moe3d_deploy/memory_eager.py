"""The tensors of the PyTorch model as it runs, line by line of `model/`: float32, attention fused, experts separate.

What is smaller than a row of tokens per view (cameras, position tables of one axis) is left out.
"""

from moe3d_deploy.costs import Sizes
from moe3d_deploy.parameter_shapes import CAMERA_MLP_RATIO, DEPTH_CHANNELS, OUTPUT_HIDDEN, mlp_width
from moe3d_deploy.tape import Tape


def record_eager(sizes: Sizes, view_chunk: int | None = None) -> Tape:
    """Depth, confidence and cameras of one batch."""
    tape = Tape()
    kept = _aggregate(tape, sizes)
    _dense(tape, sizes, view_chunk)
    tape.free(*kept)
    return tape


def _aggregate(tape: Tape, s: Sizes) -> list[int]:
    """Encoder, aggregator and camera head; returns the aggregator outputs that the dense head reads."""
    c, n, dim = s.config, s.images, s.config.aggregator.embed_dim
    patches = _encode(tape, s)
    tokens = tape.new(n, s.tokens, dim)
    head_dim = dim // c.aggregator.num_heads
    tables = [tape.new(2, count, head_dim) for count in (s.tokens, s.tokens * s.views)]
    frame: int | None = None
    kept = {}
    read = {*c.dpt_head.intermediate_layer_idx, c.aggregator.depth - 1}
    for layer in range(c.aggregator.depth):
        new_frame = _block(tape, n, s.tokens, dim, c.aggregator.mlp_ratio, c.aggregator.num_heads, rotary=True)
        if frame is not None:
            tape.free(frame)
        frame = new_frame
        new_tokens = _block(
            tape, s.batch, s.views * s.tokens, dim, c.aggregator.mlp_ratio, c.aggregator.num_heads, rotary=True
        )
        tape.free(tokens)
        tokens = new_tokens
        if layer in read:
            kept[layer] = tape.new(n, s.tokens, 2 * dim)
    tape.free(patches, tokens, *tables, *([frame] if frame is not None else []))
    _cameras(tape, s)
    levels = set(c.dpt_head.intermediate_layer_idx)
    tape.free(*(kept.pop(layer) for layer in read - levels))
    return list(kept.values())


def _encode(tape: Tape, s: Sizes) -> int:
    """Images to patch tokens (N, P, C)."""
    c, n, dim = s.config, s.images, s.config.vit.embed_dim
    centred = tape.new(n, 3, s.height, s.width)
    normalised = tape.new(n, 3, s.height, s.width)
    tape.free(centred)
    projected = tape.new(n, s.patches, dim)
    by_rows = tape.new(s.grid[0], c.pos_embed_grid, dim)
    position = tape.new(s.patches, dim)
    tape.free(by_rows)
    patches = tape.new(n, s.patches, dim)
    tape.free(projected, position)
    length = s.tokens_with(c.vit.num_register_tokens)
    tokens = tape.new(n, length, dim)
    for _ in range(c.vit.depth):
        result = _block(tape, n, length, dim, c.vit.mlp_ratio, c.vit.num_heads, rotary=False)
        tape.free(tokens)
        tokens = result
    result = tape.new(n, s.patches, dim)
    tape.free(tokens, patches, normalised)
    return result


def _block(tape: Tape, batch: int, length: int, dim: int, mlp_ratio: float, heads: int, *, rotary: bool) -> int:
    """A transformer block; its input is alive throughout and the caller's. `rotary` stands for the q/k norm as well."""

    def row(width: int = dim) -> int:
        return tape.new(batch, length, width)

    norm = row()
    qkv = row(3 * dim)
    inner = []
    if rotary:
        plain = [row(), row()]
        for _ in range(2):
            swapped, cosine, sine = row(), row(), row()
            inner.append(row())
            tape.free(swapped, cosine, sine)
        tape.free(*plain)
    attended, logsumexp = row(), tape.new(batch, heads, length)
    tape.free(logsumexp)
    out = row()
    tape.free(norm, qkv, attended, *inner)
    scaled = row()
    tape.free(out)
    middle = row()
    tape.free(scaled)

    norm = row()
    hidden = row(mlp_width(mlp_ratio, dim))
    active = row(mlp_width(mlp_ratio, dim))
    tape.free(hidden)
    out = row()
    tape.free(active, norm)
    scaled = row()
    tape.free(out)
    result = row()
    tape.free(scaled, middle)
    return result


def _cameras(tape: Tape, s: Sizes) -> None:
    c = s.config.camera_head
    modulation = tape.new(s.images, 3 * c.dim_in)
    tokens = tape.new(s.images, c.dim_in)
    for _ in range(c.trunk_depth):
        result = _block(tape, s.batch, s.views, c.dim_in, CAMERA_MLP_RATIO, c.num_heads, rotary=False)
        tape.free(tokens)
        tokens = result
    tape.free(modulation, tokens)


def _dense(tape: Tape, s: Sizes, view_chunk: int | None) -> None:
    """The depth head, chunk by chunk; the chunks' results are joined at the end."""
    step = view_chunk or s.images
    results = []
    for start in range(0, s.images, step):
        count = min(step, s.images - start)
        features = _features(tape, s, count)
        results += _last_stage(tape, s, count)
        tape.free(features)
    if len(results) > 2:
        joined = [tape.new(s.images, s.height, s.width) for _ in range(2)]
        tape.free(*joined)
    tape.free(*results)


def _features(tape: Tape, s: Sizes, n: int) -> int:
    """Four levels of tokens to full-resolution features (n, features / 2, H, W)."""
    head = s.config.dpt_head
    before: int | None = None
    levels = []
    for width, (rows, columns) in zip(head.out_channels, s.levels, strict=True):
        norm = tape.new(n, s.patches, head.dim_in)
        if before is not None:
            tape.free(before)
        projected = tape.new(n, s.patches, width)
        _position(tape, width, *s.grid)
        if (rows, columns) == s.grid:
            before = projected
            tape.free(norm)
        else:
            before = tape.new(n, width, rows, columns)
            tape.free(norm, projected)
        levels.append(tape.new(n, head.features, rows, columns))
    fused = _fuse(tape, s, n, levels, before)
    rows, columns = s.levels[0]
    narrow = tape.new(n, head.features // 2, 2 * rows, 2 * columns)
    tape.free(fused)
    full = tape.new(n, head.features // 2, s.height, s.width)
    tape.free(narrow)
    _position(tape, head.features // 2, s.height, s.width)
    return full


def _position(tape: Tape, channels: int, height: int, width: int) -> None:
    tape.free(tape.new(channels, height, width))


def _fuse(tape: Tape, s: Sizes, n: int, levels: list[int], last: int | None) -> int:
    """Coarse to fine. `last` is the coarsest level before its own convolution, alive until this returns."""
    f = s.config.dpt_head.features
    sizes = [*s.levels[::-1], (2 * s.levels[0][0], 2 * s.levels[0][1])]
    x = levels.pop()
    skip: int | None = None
    for here, after in zip(sizes, sizes[1:], strict=False):
        joined = None if skip is None else _residual(tape, n, f, here, join=True)
        unit = _residual(tape, n, f, here)
        large = tape.new(n, f, *after)
        tape.free(unit)
        result = tape.new(n, f, *after)
        tape.free(large, x, *(tensor for tensor in (joined, skip) if tensor is not None))
        x = result
        skip = levels.pop() if levels else None
    if last is not None:
        tape.free(last)
    return x


def _residual(tape: Tape, n: int, f: int, size: tuple[int, int], *, join: bool = False) -> int:
    """relu(x) + conv2(relu(conv1(relu(x)))), and with `join` the sum of that with another map."""

    def feature_map() -> int:
        return tape.new(n, f, *size)

    rectified, first = feature_map(), feature_map()
    active = feature_map()
    tape.free(first)
    second = feature_map()
    tape.free(active)
    result = feature_map()
    tape.free(rectified, second)
    if join:
        joined = feature_map()
        tape.free(result)
        result = joined
    return result


def _last_stage(tape: Tape, s: Sizes, n: int) -> list[int]:
    """VGGT's two convolutions or the experts and their mix; returns depth and confidence."""
    moe, area = s.config.moe, (s.height, s.width)

    def branch(hidden: int, out: int) -> int:
        before, active = tape.new(n, hidden, *area), tape.new(n, hidden, *area)
        tape.free(before)
        result = tape.new(n, out, *area)
        tape.free(active)
        return result

    if moe is None:
        raw = branch(OUTPUT_HIDDEN, DEPTH_CHANNELS)
        results = [tape.new(n, *area), tape.new(n, *area)]
        tape.free(raw)
        return results
    k = moe.num_experts
    parts = [branch(moe.hidden_channels, DEPTH_CHANNELS) for _ in range(k)]
    raw = tape.new(n, k, DEPTH_CHANNELS, *area)
    tape.free(*parts)
    logits = branch(moe.gate_hidden_channels, k)
    scaled, weights = tape.new(n, k, *area), tape.new(n, k, *area)
    tape.free(scaled)
    candidates = tape.new(n, k, *area)
    confident, weighted = tape.new(n, k, *area), tape.new(n, k, *area)
    tape.free(confident)
    results = [tape.new(n, *area)]
    tape.free(weighted)
    weighted = tape.new(n, k, *area)
    results.append(tape.new(n, *area))
    tape.free(weighted, weights, candidates, logits, raw)
    return results
