"""The tensors of an engine, kernel by kernel as TensorRT-RTX compiles the exported graph.

Pointwise work is part of the kernel before or after it, so only what passes between kernels is here. Read from the
layers that the builder lists; tests compare the sum with the activation memory that it reports.
"""

from moe3d_deploy.costs import BYTES, Sizes, TypeOf
from moe3d_deploy.parameter_shapes import DEPTH_CHANNELS, OUTPUT_HIDDEN, mlp_width
from moe3d_deploy.tape import FLOAT32, Tape

_PATCH = "aggregator.patch_embed.patch_embed.proj.weight"
_TRUNK = "aggregator.frame_blocks.0.attn.qkv.bias"
_HEAD = "depth_head.scratch.output_conv1.weight"


def record_compiled(sizes: Sizes, type_of: TypeOf, *, fused: bool, part: str | None = None) -> Tape:
    """Depth, confidence and cameras of one batch; inputs and outputs are the caller's memory, not the engine's.

    type_of   the type that each layer computes in, by the name of its weights
    fused     one kernel for each attention; else its weights are in memory
    part      role of a part of a split model: the work of that part alone, from its inputs to its outputs
    """
    tape = Tape()
    _Recorder(tape, sizes, type_of, fused).run(part)
    return tape


class _Recorder:
    def __init__(self, tape: Tape, sizes: Sizes, type_of: TypeOf, fused: bool) -> None:
        self.tape, self.sizes, self.fused = tape, sizes, fused
        self.patch, self.trunk, self.head = (BYTES[type_of(name)] for name in (_PATCH, _TRUNK, _HEAD))

    def run(self, part: str | None) -> None:
        if part == "encoder":
            self.tape.free(self._encode())  # its norm is written into the output
            return
        kept: list[tuple[int, ...]] = [() for _ in self.sizes.levels]  # of the heads alone: the caller's
        if part != "heads":
            stream = self._encode() if part != "decoder" else None
            kept = self._aggregate(stream, keep=part != "aggregator")
        if part != "aggregator":
            self._last_stage(self._dense(kept))

    def _encode(self) -> int:
        """Images to the encoder's residual stream, before its last norm."""
        s, tape, c = self.sizes, self.tape, self.sizes.config
        n, dim, vit = s.images, c.aggregator.embed_dim, c.vit
        cast = tape.new(n, 3, s.height, s.width, size=self.patch)
        padded = tape.new(n, 4, s.height, s.width, size=self.patch)  # the convolution reads channels in fours
        tape.free(cast)
        patches = tape.new(n, s.patches, dim, size=self.patch)
        tape.free(padded)
        length = s.tokens_with(vit.num_register_tokens)
        stream = tape.new(n, length, dim)
        norm = tape.new(n, length, dim, size=self.trunk)
        tape.free(patches)
        for _ in range(vit.depth):
            stream, norm = self._block(stream, norm, n, length, vit.num_heads, vit.mlp_ratio, rotary=False)
        tape.free(norm)
        return stream

    def _aggregate(self, stream: int | None, *, keep: bool) -> list[tuple[int, ...]]:
        """The frame's and the scene's tokens of each level that the dense head reads.

        stream   of `_encode`; None where the tokens are an input
        keep     the levels stay in memory for the dense head; else each is an output, written when it is there
        """
        s, tape, c = self.sizes, self.tape, self.sizes.config
        n, dim = s.images, c.aggregator.embed_dim
        tokens = tape.new(n, s.tokens, dim)
        if stream is not None:
            tape.free(stream)
        norm = tape.new(n, s.tokens, dim, size=self.trunk)
        tables = [tape.new(2, count, dim // c.aggregator.num_heads) for count in (s.tokens, s.views * s.tokens)]
        kept: dict[int, tuple[int, ...]] = {}
        read = {*c.dpt_head.intermediate_layer_idx}
        heads, ratio = c.aggregator.num_heads, c.aggregator.mlp_ratio
        for layer in range(c.aggregator.depth):
            is_read = layer in read
            frame, norm = self._block(tokens, norm, n, s.tokens, heads, ratio, rotary=True)
            tokens, norm = self._block(
                frame, norm, s.batch, s.views * s.tokens, heads, ratio, rotary=True, keep_input=is_read
            )
            if is_read and keep:
                kept[layer] = (frame, tokens)
                tokens = tape.new(n, s.tokens, dim)
            elif is_read:
                tape.free(frame)
        tape.free(tokens, norm, *tables)
        return [kept.get(layer, ()) for layer in c.dpt_head.intermediate_layer_idx]

    def _block(
        self,
        stream: int,
        norm: int,
        batch: int,
        length: int,
        heads: int,
        mlp_ratio: float,
        *,
        rotary: bool,
        keep_input: bool = False,
    ) -> tuple[int, int]:
        """One transformer block: takes the residual stream and its norm, returns those of the next block."""
        tape, dim, t = self.tape, self.sizes.config.aggregator.embed_dim, self.trunk

        def row(width: int = dim, size: int = t) -> int:
            return tape.new(batch, length, width, size=size)

        qkv = row(3 * dim)
        tape.free(norm)
        operands = []
        if rotary:  # the q/k norm is float32
            for _ in range(2):
                centred = row(size=FLOAT32)
                operands.append(row())
                tape.free(centred)
        else:
            operands += [row(), row()]
        operands.append(row())
        tape.free(qkv)
        if not self.fused:
            operands = [self._explicit_weights(operands, batch, length, heads)]
        attended = row()
        tape.free(*operands)
        projected = row(size=FLOAT32)
        tape.free(attended)
        middle, norm = row(size=FLOAT32), row()
        tape.free(projected)
        if not keep_input:
            tape.free(stream)
        hidden = row(mlp_width(mlp_ratio, dim))
        tape.free(norm)
        result = row(size=FLOAT32)
        tape.free(hidden, middle)
        return result, row()

    def _explicit_weights(self, operands: list[int], batch: int, length: int, heads: int) -> int:
        """Products of queries and keys, then their softmax; the values go on to the next kernel."""
        tape = self.tape
        logits = tape.new(batch, heads, length, length, size=self.trunk)
        weights = tape.new(batch, heads, length, length, size=self.trunk)
        tape.free(logits, *operands)
        return weights

    def _dense(self, kept: list[tuple[int, ...]]) -> int:
        """The dense head up to its full-resolution features; coarse to fine, each level just before it is needed."""
        s, tape, f = self.sizes, self.tape, self.sizes.config.dpt_head.features
        rows, columns = s.levels[0]
        above = [(2 * rows, 2 * columns), *s.levels]
        x: int | None = None
        for level in (3, 2, 1, 0):
            read_later = kept[level] in kept[:level]  # two levels may read the same tokens
            skip = self._level(level, () if read_later else kept[level])
            x = self._fusion(skip, x, s.levels[level], above[level])
        projected = self._map(f, above[0])
        tape.free(x)  # type: ignore[arg-type]
        narrow = self._map(f // 2, above[0])
        tape.free(projected)
        features = self._map(f // 2, (s.height, s.width))
        tape.free(narrow)
        return features

    def _map(self, channels: int, size: tuple[int, int]) -> int:
        return self.tape.new(self.sizes.images, channels, *size, size=self.head)

    def _level(self, level: int, tokens: tuple[int, ...]) -> int:
        """Tokens to the map that a fusion adds; `tokens` are those that nothing reads after this."""
        s, tape, head = self.sizes, self.tape, self.sizes.config.dpt_head
        width, size = head.out_channels[level], s.levels[level]
        centred = tape.new(s.images, s.patches, head.dim_in)
        tape.free(*tokens)
        norm = self._map(head.dim_in, s.grid)
        tape.free(centred)
        projected = self._map(width, s.grid)
        tape.free(norm)
        x = self._map(width, s.grid)
        tape.free(projected)
        if size != s.grid:
            resized = self._map(width, size)
            tape.free(x)
            x = resized
        result = self._map(head.features, size)
        tape.free(x)
        return result

    def _fusion(self, skip: int, x: int | None, here: tuple[int, int], after: tuple[int, int]) -> int:
        """The skip's residual unit and the sum with `x`, unless this is the coarsest level; a unit; the resize."""
        tape, f = self.tape, self.sizes.config.dpt_head.features

        def unit(source: int) -> int:
            between = self._map(f, here)
            result = self._map(f, here)
            tape.free(between, source)
            return result

        if x is not None:
            of_skip = unit(skip)
            skip = self._map(f, here)
            tape.free(x, of_skip)
        fused = unit(skip)
        result = self._map(f, after)
        tape.free(fused)
        return result

    def _last_stage(self, features: int) -> None:
        s, tape, moe = self.sizes, self.tape, self.sizes.config.moe
        full = (s.height, s.width)
        width = moe.num_experts * moe.hidden_channels + moe.gate_hidden_channels if moe else OUTPUT_HIDDEN
        hidden = self._map(width, full)
        tape.free(features)
        if moe is None:
            raw = tape.new(s.images, DEPTH_CHANNELS, *full)
            tape.free(hidden, raw)
            return
        logits = tape.new(s.images, moe.num_experts, *full)
        sums = tape.new(s.images, DEPTH_CHANNELS * moe.num_experts, *full)  # one kernel's, for depths and confidences
        tape.free(hidden, logits, sums)
