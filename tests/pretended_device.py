"""A device that is not there: its tensors hold real numbers, which are computed on the CPU, and count as far away.

PyTorch hands every operation to it, the backward pass and the optimizer included, and it objects to what a GPU's host
would wait for: a value that is asked for, a shape that depends on values (a boolean index), a copy with the host
standing by, a tensor of the host among the device's. Below PyTorch's operations it cannot look (a kernel that waits
inside, streams, pinned memory).
"""
import copy
from contextlib import contextmanager

import torch
import torch.optim.optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from finessl.bench.runner import BenchConfig, BenchmarkRunner
from finessl.gpu import Variant


class Far(torch.Tensor):
    "A tensor on a device that is not there: the numbers are `.near`, on the CPU."
    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(cls, near.shape, strides=near.stride(), dtype=near.dtype,
                                                   storage_offset=near.storage_offset(), device="meta")

    def __init__(self, near): self.near = near
    def fetched(self): return self.cpu() if PretendedDevice.active else self.near
    def tolist(self): return self.fetched().tolist()
    def __repr__(self): return repr(self.fetched()) # whoever prints a value asks for it
    def __format__(self, form): return format(self.fetched(), form)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of PretendedDevice")


# answers or shapes that depend on numbers
VALUES = ("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount",
          "repeat_interleave", "_unique2", "unique_dim", "unique_consecutive")


def wait_in(func, args, kwargs) -> str: # "" where there is none
    "What in an operation, seen before it is carried out, a GPU would make the host wait for."
    name, leaves = func.overloadpacket.__name__, [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    far, there = any(isinstance(t, Far) for t in leaves), is_far(kwargs.get("device"))
    if name == "_to_copy":
        if far and kwargs.get("device") is not None and not there: return "asks the device for values"
        return "" if far or not there or kwargs.get("non_blocking") else "copies to the device while the host waits"
    if not far: return ""
    if name == "copy_" and not all(isinstance(t, Far) for t in args[:2]):
        if not isinstance(args[0], Far): return "asks the device for values"
        return "" if len(args) > 2 and args[2] else "copies to the device while the host waits"
    if name in VALUES: return f"asks the device for values ({name})"
    if name.startswith("index") and any(is_mask(t) for t in tree_leaves(args[1])):
        return "asks the device which indices are meant (boolean index)"
    if any(t.is_meta and not isinstance(t, Far) for t in leaves):
        return f"fills a tensor on the device with numbers of the host, before {name}"
    if name != "copy_" and any(not isinstance(t, Far) and t.ndim for t in leaves):
        return f"copies to the device while the host waits: a tensor of the host in {name}"
    return ""


def is_mask(t) -> bool: return isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)
def is_far(device) -> bool: return device is not None and torch.device(device).type == "meta"


class PretendedDevice(TorchDispatchMode):
    """While active, the device `meta` has numbers; inside `strictly()` an operation that a GPU's host would wait for is
    an error. (PyTorch's fused optimizer works on devices that it knows, so it is told of this one.)"""
    strict, active = False, 0

    def __enter__(self):
        PretendedDevice.active += 1
        self.supported = optimizers._get_fused_kernels_supported_devices
        optimizers._get_fused_kernels_supported_devices = lambda: [*self.supported(), "meta"]
        return super().__enter__()

    def __exit__(self, *exc):
        PretendedDevice.active -= 1
        optimizers._get_fused_kernels_supported_devices = self.supported
        return super().__exit__(*exc)

    @contextmanager
    def strictly(self, strict: bool = True):
        before, self.strict = self.strict, strict
        try: yield
        finally: self.strict = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.strict and (why := wait_in(func, args, kwargs)): raise AssertionError(why)
        near = lambda v: v.near if isinstance(v, Far) else v
        copied, there = func.overloadpacket is torch.ops.aten._to_copy, is_far(kwargs.get("device"))
        far = there or kwargs.get("device") is None and any(isinstance(t, Far) for t in tree_leaves((args, kwargs)))
        out = func(*tree_map(near, args), **tree_map(near, kwargs) | ({"device": torch.device("cpu")} if there else {}))
        if not far: return out
        out = tree_map(lambda v: Far(v) if isinstance(v, torch.Tensor) else v, out)
        return out if copied else return_and_correct_aliasing(func, args, kwargs, out)


def check_waits_for_nothing(
    f # takes a device, prepares there, and returns a function without arguments, which must not wait for it
): # what that function returns
    "Assert that work on a device never makes the host wait."
    with PretendedDevice() as device:
        work = f(torch.device("meta"))
        with device.strictly(): return work()


def steps_there(
    variant: Variant, config: BenchConfig, device,
    steps: int = 3,
    accumulate: int = 1 # pieces that a step's images are computed in
): # a function that takes the steps and returns their losses
    "Steps of a variant, ready to be taken on another device."
    config = config._replace(encoder=copy.deepcopy(config.encoder), device=torch.device(device))
    runner = BenchmarkRunner(variant, config)
    runner.accumulate = accumulate
    return lambda: [runner.step(runner.images(t), t) for t in range(steps)]
