"""A stub of `liger_kernel` that uses torch and overwrites the same tensors as Liger."""

import importlib.machinery
import types

import torch
from torch.nn import functional as F


class Overwriting(torch.autograd.Function):
    """A gated product; the gradients overwrite the inputs."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = (x.detach() for x in ctx.saved_tensors)
        grad_up = F.silu(gate) * grad
        gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return gate, up.copy_(grad_up)


class Turning(torch.autograd.Function):
    """Rotation of queries and keys ``[1, heads, N, D]``, in place if tokens are contiguous in
    memory."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return tuple(turned(x, cos, sin) for x in (q, k))

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        return (*(turned(x, cos, -sin) for x in grads), None, None)


def turned(x, cos, sin):
    """x, and angles ``[N, D]`` whose second half repeats the first."""
    tokens = x.transpose(1, 2).contiguous()
    first, second = tokens.float().chunk(2, -1)
    other = torch.cat([-second, first], -1)
    tokens.copy_(tokens.float() * cos[:, None] + other * sin[:, None])
    return tokens.transpose(1, 2)


class LigerStub:
    """The package; the result of the function `wrong` is a tenth too large, and `calls` lists the
    called functions."""

    def __init__(self, wrong=None):
        def norm(x, weight, eps, *options):
            assert options == (0.0, "llama", False)
            return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)

        self.calls, self.wrong = [], wrong
        made = {
            "rms_norm": ("LigerRMSNormFunction", norm),
            "swiglu": ("LigerSiLUMulFunction", Overwriting.apply),
            "rope": ("LigerRopeFunction", Turning.apply),
        }
        self.modules = {"liger_kernel": types.ModuleType("liger_kernel")}
        self.modules["liger_kernel"].__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
        self.modules["liger_kernel.ops"] = types.ModuleType("liger_kernel.ops")
        for name, (kind, function) in made.items():
            module = types.ModuleType(f"liger_kernel.ops.{name}")
            setattr(module, kind, types.SimpleNamespace(apply=self.counted(name, function)))
            self.modules[module.__name__] = module

    def counted(self, name, function):
        """The function, which records its name when called."""

        def call(*arguments):
            self.calls.append(name)
            found = function(*arguments)
            if name != self.wrong:
                return found
            return tuple(1.1 * x for x in found) if isinstance(found, tuple) else 1.1 * found

        return call
