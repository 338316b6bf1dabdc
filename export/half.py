"""Run a 16-bit model on a CPU as a GPU would round it, and record how close its values come to overflow.

ONNX Runtime computes 16-bit graphs in float32 on a CPU, so a pass there says nothing about overflow. Here products
and convolutions are computed in float32 and rounded to the 16-bit type: float32 sums, 16-bit results, which is what
tensor cores do. (torch's own half convolutions on a CPU give the same at about 1/50 of the speed.) All other
operations run in torch as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
}


class SixteenBitRun(TorchDispatchMode):
    """While active, rounds products as described and keeps the largest |x| per 16-bit tensor of `model`.

    `largest` maps "module path: operation" to that value, `shares` to its share of the tensor's type; a non-finite
    result is recorded as inf. An operation of no submodule is named "after module path", the one that ended last.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.largest: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self._model = model
        self._path: list[str] = []
        self._ended = ""
        self._hooks: list[Any] = []

    def __enter__(self) -> "SixteenBitRun":
        for name, module in self._model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda _m, _i, name=name: self._path.append(name)))
            self._hooks.append(module.register_forward_hook(lambda _m, _i, _o: self._leave()))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = next((a.dtype for a in args if isinstance(a, Tensor) and a.dtype in _SIXTEEN_BIT), None)
        if func in _PRODUCTS and dtype is not None:
            result = func(*tree_map(_widen, args), **tree_map(_widen, kwargs)).to(dtype)
        else:
            result = func(*args, **kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype in _SIXTEEN_BIT and tensor.numel():
                path = (self._path and self._path[-1]) or f"after {self._ended or 'the start'}"
                self._record(f"{path}: {func.overloadpacket.__name__}", tensor)
        return result

    def _record(self, key: str, tensor: Tensor) -> None:
        low, high = tensor.aminmax()
        largest = max(-float(low), float(high))
        if not largest < float("inf"):  # inf or nan
            largest = float("inf")
        self.largest[key] = max(largest, self.largest.get(key, 0.0))
        self.shares[key] = max(largest / torch.finfo(tensor.dtype).max, self.shares.get(key, 0.0))

    def _leave(self) -> None:
        self._ended = self._path.pop()


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _SIXTEEN_BIT else value
