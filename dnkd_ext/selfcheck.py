"""``dnkd info --check``: every loss against its reference on this machine."""

from __future__ import annotations

import torch

from dnkd_ext import _extension
from dnkd_ext._checks import LOSS_DTYPES
from dnkd_ext.losses import LOSSES

__all__ = ["self_check"]


def self_check() -> bool:
    """Print a line per operator, device and dtype; True where all agree.

    Compared are the loss and its gradient with the reference in float64 on the same inputs; the
    bound is 1e-5 of the largest gradient element (1e-12 for float64) plus the rounding of the
    gradient's own dtype.
    """
    if not _extension.is_loaded():
        print(f"FAIL no compiled operators to check: {_extension.load_error()}")
        return False
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    passed = True
    for name, loss in LOSSES.items():
        for device in devices:
            for dtype in LOSS_DTYPES:
                if not _extension.has_kernel_for(torch.empty(0, device=device)):
                    print(f"skip {name} {device}: there are no kernels for it")
                    break
                error = max(
                    _error(loss, args, kwargs, dtype, device)
                    for args, kwargs in loss.examples(torch.Generator().manual_seed(0))
                )
                bound = 1e-12 if dtype == torch.float64 else 1e-5
                if dtype.itemsize == 2:
                    bound += torch.finfo(dtype).eps
                good = error <= bound  # a NaN is not
                passed = passed and good
                word = "PASS" if good else "FAIL"
                print(
                    f"{word} {name} {device} {str(dtype)[6:]}: error {error:.1e}, bound {bound:.1e}"
                )
    return passed


def _error(loss, args, kwargs, dtype, device) -> float:
    def evaluate(function, to):
        def prepare(value):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return value.to(device) if isinstance(value, torch.Tensor) else value
            seen = value.to(dtype) if value.dtype == torch.float64 else value
            return seen.to(device, to or seen.dtype)

        values = [prepare(value) for value in args]
        values[0].requires_grad_()
        result = function(*values, **{key: prepare(value) for key, value in kwargs.items()})
        result = result if isinstance(result, torch.Tensor) else result[0]
        # An upstream gradient that is not 1, so that it has to be multiplied in.
        (gradient,) = torch.autograd.grad(3 * result.sum(), values[0])
        return result.detach().double(), gradient.double()

    fused, reference = evaluate(loss.fused, None), evaluate(loss.reference, torch.float64)
    differences = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(fused, reference, strict=True)
    ]
    return float("nan") if any(d != d for d in differences) else max(differences)
