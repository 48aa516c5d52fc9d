"""Fake device: tensors on it have a shape, a dtype and a device, and no numbers.

    device = FakeDevice("cuda:1")
    with torch.no_grad(), device:
        device.adopt(module)
        y = module(x.to("cuda:1"))

Operations are checked as on the device: mixing two devices raises, and so does whatever needs a number
(`.item()`, `.tolist()`, `if tensor:`), which is where a real device synchronizes. Copies from the device are
listed in `read_back`, copies to it in `brought`, and every operation on it in `operations`. Tensors on the
CPU have their numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Operation(NamedTuple):
    """One operation with a tensor of the device among its arguments or results."""

    name: str  # such as "aten.addmm"
    dtypes: frozenset[torch.dtype]  # of its tensors on the device
    devices: frozenset[str]  # of its tensors; single numbers left out


class _InPython(TorchFunctionMode):
    """x[...], ~x, contiguous and attention: they need the device itself, which is not there."""

    def __init__(self, owner: FakeDevice) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], FakeTensor):
            return func(*args, **kwargs)
        if func in (torch.Tensor.__invert__, torch.Tensor.contiguous):
            return self.owner.by_shape(func, *args)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return self.owner.indexed(func.__name__, *args)
        if func is scaled_dot_product_attention:
            return self.owner.attended(*args, mask=kwargs.get("attn_mask"))
        return func(*args, **kwargs)


class FakeDevice(FakeTensorMode):
    """See above. device: any name that torch.device accepts."""

    def __init__(self, device: str) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.device = torch.device(device)
        self.operations: list[Operation] = []
        self.read_back: list[str] = []
        self.brought: list[str] = []
        self._inside = False
        self._in_python: list[_InPython] = []

    def __enter__(self) -> FakeDevice:
        super().__enter__()
        self._in_python.append(_InPython(self))
        self._in_python[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._in_python.pop().__exit__(*error)
        super().__exit__(*error)

    def adopt(self, *modules: nn.Module) -> None:
        """Put every weight of the modules on the device, as the host does when it loads them."""
        for module in (child for root in modules for child in root.modules()):
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(self.like(weight), requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, self.like(buffer))

    def like(self, tensor: torch.Tensor) -> FakeTensor:
        """A tensor's shape and type on the device, as if it had always been there."""
        return FakeTensor(self, torch.empty_like(tensor, device="meta"), self.device)

    def forget(self) -> None:
        """Empty the three lists."""
        for each in (self.operations, self.read_back, self.brought):
            each.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        elsewhere = any(isinstance(leaf, torch.device) and leaf.type == self.device.type for leaf in leaves)
        if self._inside:  # parts of an operation that is being faked
            return super().__torch_dispatch__(func, types, args, kwargs)
        if not elsewhere and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        self._inside = True
        try:
            args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
            # the parts of an operation are not written in Python's x[...]
            with torch._C.DisableTorchFunction():
                result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._inside = False
        self._note(str(func.overloadpacket), leaves, tree_leaves(result))
        return result

    def indexed(self, name: str, tensor: FakeTensor, index: Any, value: Any = None) -> FakeTensor | None:
        """tensor[index], or None if a value is set. Indices are copied to the device."""
        parts = index if isinstance(index, tuple) else (index,)
        lists = [torch.as_tensor(part) for part in parts if isinstance(part, list)]
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        if any(t.dtype == torch.bool for t in tensors):
            raise RuntimeError("A mask as an index: the number of its true entries is read from the device.")
        if name == "__setitem__":
            self._note("setitem", [tensor, value, *tensors, *lists], [])
            return None
        self._note("getitem", [tensor, *tensors, *lists], [])
        return self.by_shape(torch.Tensor.__getitem__, tensor, index)

    def by_shape(self, func: Any, tensor: FakeTensor, *args: Any) -> FakeTensor:
        """func(tensor, *args), with only the shape computed."""
        shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        result = FakeTensor(self, func(shape, *_on_meta(args)), tensor.device)
        self._note(func.__name__, [tensor], [result])
        return result

    def attended(
        self, q: FakeTensor, k: FakeTensor, v: FakeTensor, mask: torch.Tensor | None = None
    ) -> FakeTensor:
        """The result of scaled_dot_product_attention."""
        inputs = [q, k, v] if mask is None else [q, k, v, mask]
        if {t.device for t in inputs} != {self.device} or len({t.dtype for t in (q, k, v)}) > 1:
            raise RuntimeError(f"Attention of {[(t.device, t.dtype) for t in inputs]}.")
        result = q.new_empty(*q.shape[:-1], v.shape[-1])
        self._note("scaled_dot_product_attention", inputs, [result])
        return result

    def _faked(self, tensor: torch.Tensor) -> FakeTensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)

    def _note(self, name: str, arguments: list[Any], results: list[Any]) -> None:
        inputs, outputs = ([t for t in ts if isinstance(t, torch.Tensor)] for ts in (arguments, results))
        on_device = [t for t in (*inputs, *outputs) if t.device == self.device]
        if not on_device or name.startswith("prim."):  # attributes, such as prim.device
            return
        devices = frozenset(str(t.device) for t in (*inputs, *outputs) if t.ndim)
        self.operations.append(Operation(name, frozenset(t.dtype for t in on_device), devices))
        if any(t.device.type == "cpu" for t in outputs):
            self.read_back.append(name)
        if any(t.device.type == "cpu" and t.ndim for t in inputs):
            self.brought.append(name)


def _on_meta(index: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), index)
