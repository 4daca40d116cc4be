"""Weights that exist only while their module runs, as in sharded training (ZeRO-3, FSDP2)."""

import contextlib

import torch


def units_of(model):
    """Modules whose weights are gathered together: the layers, and every module outside them that
    has weights of its own."""
    layers = [
        layer
        for holder in model.modules()
        if isinstance(holder, torch.nn.ModuleList)
        for layer in holder
        if any(True for _ in layer.parameters())
    ]
    inside = {id(module) for layer in layers for module in layer.modules()}
    alone = []
    for module in model.modules():
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
            alone.append(module)
            inside |= {*map(id, module.modules())}
    return [*layers, *alone]


def _tensors(output):
    """The tensors of a module's output that get gradients."""
    found = output if isinstance(output, tuple) else (output,)
    return [x for x in found if isinstance(x, torch.Tensor) and x.requires_grad]


class Gathered:
    """Removes the weights of `units` except while a unit runs forward or backward.

    A weight that is away is an empty tensor, and the memory that it had is full of NaN, unless
    autograd holds it as a tensor of its own: an address that was kept reads these. A unit's weights
    come in its forward and backward pre-hooks; in the backward pass they go when the next unit
    begins, since gradients of a unit whose input needs none are finished without a hook.

    Args:
        units: modules whose weights go together.
        on_outputs: learn of the backward pass by hooks on a unit's output tensors, as FSDP2, and
            not by torch's hooks on modules. These miss a gradient that arrives by an output which
            a forward hook has kept, as transformers keeps hidden states.

    Attributes:
        entered: how often each unit was gathered.
    """

    def __init__(self, units, *, on_outputs=False):
        self.units, self._on_outputs = list(units), on_outputs
        self.entered = [0] * len(self.units)
        self._kept = [[(p, p.data.clone()) for p in unit.parameters()] for unit in self.units]
        self._backward = None
        self._graveyard = []  # so that nothing else gets the memory
        self._handles = []

    def __enter__(self):
        for index, unit in enumerate(self.units):
            self._release(index)
            self._handles += [
                unit.register_forward_pre_hook(lambda *_, i=index: self._before(i)),
                unit.register_forward_hook(
                    lambda _, inputs, output, i=index: self._after(i, output), always_call=True
                ),
            ]
            if not self._on_outputs:
                hook = unit.register_full_backward_pre_hook
                self._handles.append(hook(lambda *_, i=index: self._before_backward(i)))
        return self

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()
        for kept in self._kept:
            for parameter, values in kept:
                parameter.data = values

    def backward(self, loss):
        """Backpropagate; afterwards nothing is gathered."""
        loss.backward()
        self._end_backward()

    def _before(self, index):
        self.entered[index] += 1
        if index != self._backward:
            self._gather(index)

    def _after(self, index, output):
        for tensor in _tensors(output) if self._on_outputs else ():
            tensor.register_hook(lambda _: self._before_backward(index))
        if index != self._backward:  # recomputed: the backward pass of the unit follows
            self._release(index)

    def _before_backward(self, index):
        if self._backward == index:
            return
        self._end_backward()
        self._backward = index
        self._gather(index)

    def _end_backward(self):
        if self._backward is not None:
            self._release(self._backward)
        self._backward = None

    def _gather(self, index):
        for parameter, values in self._kept[index]:
            parameter.data = values.clone()

    def _release(self, index):
        for parameter, _ in self._kept[index]:
            gone = parameter.data
            parameter.data = gone.new_empty(0)
            if _owners(gone) > _owners(torch.empty(1)):  # a view that autograd saved
                continue
            if gone.is_floating_point():
                gone.fill_(float("nan"))
            else:
                gone.fill_(119)  # 4-bit weights: two times the number 7
            self._graveyard.append(gone)


def _owners(tensor):
    """Number of tensors that share the memory of `tensor`."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def nothing_gathered(_):
    """No gathering, for comparison."""

    class Plain:
        def backward(self, loss):
            loss.backward()

    yield Plain()
