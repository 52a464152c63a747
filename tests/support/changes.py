"""Whatever can be done to the weights, parts and settings of a module between two calls."""

from __future__ import annotations

import copy
import io
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from ceit_kernels import fuse, unfuse

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.LayerNorm)


class Inapplicable(Exception):
    """There is nothing in the module to which a change could be done."""


class Live:
    """A module and what has been done to it.

    Attributes:
        model: holds the module alone, so that it too can be replaced.
        x: an input, in the dtype of the module.
        undo: take away, one each, what the operators leave to plain PyTorch.
    """

    def __init__(self, module: nn.Module, x: Tensor, seed: int) -> None:
        self.model, self.x = nn.Sequential(module).eval(), x
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.undo: list[Callable[[], object]] = []

    def parameter(self) -> Tensor:
        return self._any(list(self.model.parameters()))

    def layer(self, *classes: type[nn.Module]) -> nn.Module:
        """A layer with a weight of its own, of some classes if they are given."""
        return self._any(
            module
            for module in self.model.modules()
            if isinstance(module._parameters.get("weight"), nn.Parameter)
            and isinstance(module, classes or nn.Module)
            and not parametrize.is_parametrized(module)
        )

    def child(self, *classes: type[nn.Module]) -> tuple[nn.Module, str, nn.Module]:
        """A module, its name in its parent and the parent, which is called through that name."""
        return self._any(
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent.named_children()
            if isinstance(child, classes or nn.Module) and not isinstance(child, nn.ModuleList)
        )

    def _any(self, found):
        found = list(found)
        if not found:
            raise Inapplicable
        return self.random.choice(found)

    def fresh(self, like: Tensor) -> Tensor:
        """Other values for a tensor: positive vectors, and matrices that keep the size of what they multiply."""
        if like.dim() < 2:
            values = torch.rand(like.shape, generator=self.generator, dtype=torch.float64) + 0.5
        else:
            values = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
            values /= math.sqrt(like[0].numel())
        return values.to(like.dtype)


# What only changes values, and leaves the module to the operators.


def optimizer(live: Live) -> None:
    if not any(parameter.requires_grad for parameter in live.model.parameters()):
        raise Inapplicable
    makes = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)
    kind = live.random.choice(({"fused": True}, {"foreach": True}, {"foreach": False}))
    made = live.random.choice(makes)(live.model.parameters(), lr=0.05, **kind)
    live.model.train()
    for _ in range(2):
        made.zero_grad()
        out = live.model(live.x)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        made.step()
    live.model.zero_grad()
    live.model.eval()


def write_to_data(live: Live) -> None:
    for parameter in live.model.parameters():
        parameter.data.copy_(live.fresh(parameter))


def replace_data(live: Live) -> None:
    for parameter in live.model.parameters():
        parameter.data = live.fresh(parameter)


def write_without_gradient(live: Live) -> None:
    with torch.no_grad():
        for parameter in live.model.parameters():
            parameter.copy_(live.fresh(parameter))


def write_through_numpy(live: Live) -> None:
    for parameter in live.model.parameters():
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
        parameter.detach().view(bits).numpy()[...] = live.fresh(parameter).view(bits).numpy()


def write_by_a_collective(live: Live) -> None:
    # Not there longer than this: norms that span processes compute on GPUs alone.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for parameter in live.model.parameters():
            parameter.data = parameter.data.contiguous()
            dist.scatter(parameter.data, [live.fresh(parameter)])
    finally:
        dist.destroy_process_group()


def write_through_shared_memory(live: Live) -> None:
    """The memory of a file, at two addresses, as two processes have it."""
    with tempfile.TemporaryDirectory() as folder:
        for index, parameter in enumerate(live.model.parameters()):
            here, there = (
                torch.from_file(
                    str(Path(folder) / str(index)), shared=True, size=parameter.numel(), dtype=parameter.dtype
                )
                for _ in range(2)
            )
            here.copy_(parameter.data.flatten())
            parameter.data = here.view(parameter.shape)
            with torch.no_grad():
                live.model(live.x)
                there.copy_(live.fresh(parameter).flatten())


def free_and_fill_storages(live: Live) -> None:
    """As sharded models do between calls."""
    for parameter in live.model.parameters():
        storage, values = parameter.untyped_storage(), live.fresh(parameter)
        if storage.resizable() and storage.nbytes() == values.nbytes:
            storage.resize_(0)
            storage.resize_(values.nbytes)
        parameter.data.copy_(values)


def write_buffers(live: Live) -> None:
    buffers = [buffer for buffer in live.model.buffers() if buffer.is_floating_point()]
    if not buffers:
        raise Inapplicable
    for buffer in buffers:
        buffer.copy_(live.fresh(buffer))


def load_state(live: Live, **options: object) -> None:
    state = live.model.state_dict()
    floating = {name: live.fresh(tensor) for name, tensor in state.items() if tensor.is_floating_point()}
    live.model.load_state_dict({**state, **floating}, **options)


def load_state_by_assignment(live: Live) -> None:
    load_state(live, assign=True)


def swap_tensors(live: Live) -> None:
    for parameter in live.model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(live.fresh(parameter)))


def replace_parameters(live: Live) -> None:
    for module in live.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, None)
                setattr(module, name, nn.Parameter(live.fresh(parameter)))


def replace_a_layer_by_another(live: Live) -> None:
    # What was done to the old one could not be undone in its copy.
    if live.undo:
        raise Inapplicable
    parent, name, old = live.child(nn.Linear, nn.Conv2d, *NORMS)
    setattr(parent, name, copy.deepcopy(old))
    for parameter in getattr(parent, name).parameters():
        parameter.data = live.fresh(parameter)


# What changes settings, and leaves the module to the operators.


def replace_the_model_by_a_copy(live: Live) -> None:
    # Neither copies nor pickles take what some ways of reparametrising leave in a module.
    if live.undo:
        raise Inapplicable
    if live.random.random() < 0.5:
        live.model = copy.deepcopy(live.model)
    else:
        memory = io.BytesIO()
        torch.save(live.model, memory)
        memory.seek(0)
        live.model = torch.load(memory, weights_only=False)


def fuse_again(live: Live) -> None:
    # A forward that was wrapped is a method of the class that the module then had.
    if any("forward" in vars(module) for module in live.model.modules()):
        raise Inapplicable
    unfuse(live.model)
    with torch.no_grad():
        live.model(live.x)
    fuse(live.model)


def cast(live: Live) -> None:
    dtype = live.random.choice((torch.float32, torch.float64, torch.bfloat16))
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(live.random.random() < 0.5)
    try:
        live.model.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    live.x = live.x.to(dtype)


def move_to_another_device_and_back(live: Live) -> None:
    state = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    buffers = [(module, dict(module._buffers)) for module in live.model.modules()]
    live.model.to("meta")
    live.model.load_state_dict(state, assign=True)
    for module, kept in buffers:
        for name, buffer in kept.items():
            if buffer is not None and module._buffers[name].is_meta:
                module._buffers[name] = buffer


def change_eps(live: Live) -> None:
    live.layer(*NORMS).eps = live.random.choice((1e-5, 1e-3, 0.1))


def drop_a_bias(live: Live) -> None:
    live.layer(nn.Conv2d, nn.Linear, *NORMS).bias = None


def synchronise_norms(live: Live) -> None:
    live.model = nn.SyncBatchNorm.convert_sync_batchnorm(live.model)


def freeze_parameters(live: Live) -> None:
    for parameter in live.model.parameters():
        parameter.requires_grad_(live.random.random() < 0.7)


# What the operators leave to plain PyTorch, until it is undone.


def put_a_hook(live: Live) -> None:
    _, _, child = live.child()
    kind = live.random.choice(("forward", "forward pre", "backward", "everywhere"))
    if kind == "forward":
        handle = child.register_forward_hook(lambda module, args, out: _scaled(out))
    elif kind == "forward pre":
        handle = child.register_forward_pre_hook(lambda module, args: (_scaled(args[0]), *args[1:]))
    elif kind == "backward":
        handle = child.register_full_backward_hook(lambda module, grads, _: tuple(map(_scaled, grads)))
    else:
        kind = type(child)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: _scaled(out) if type(module) is kind else None
        )
    live.undo.append(handle.remove)


def _scaled(value):
    return value * 1.25 if isinstance(value, Tensor) else value


def put_in_an_adapter(live: Live) -> None:
    parent, name, old = live.child(nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.GELU)
    setattr(parent, name, Adapter(old))
    live.undo.append(lambda: setattr(parent, name, old))


class Adapter(nn.Module):
    """Adds to what a layer computes, and looks like it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.factor = base, nn.Parameter(torch.tensor(0.5, dtype=_dtype_of(base)))
        self.train(base.training)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *arguments, **options):
        return self.base(*arguments, **options) * (1 + self.factor)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters()), None)


def replace_a_forward(live: Live) -> None:
    layer = live.layer(nn.Linear, nn.Conv2d, *NORMS)
    if "forward" in layer.__dict__:
        raise Inapplicable
    right = layer.forward
    layer.forward = lambda *arguments, **options: right(*arguments, **options) * 1.25
    live.undo.append(lambda: layer.__dict__.pop("forward"))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrise(live: Live) -> None:
    layer = live.layer(nn.Linear, nn.Conv2d)
    if "weight" not in layer._parameters or layer._forward_pre_hooks:
        raise Inapplicable
    kind = live.random.choice(("doubled", "weight_norm", "old weight_norm", "pruned"))
    if kind == "doubled":
        parametrize.register_parametrization(layer, "weight", Doubled())
    elif kind == "weight_norm":
        parametrizations.weight_norm(layer)
    elif kind == "old weight_norm":
        weight_norm(layer)
        live.undo.append(lambda: nn.utils.remove_weight_norm(layer))
        return
    else:
        prune.l1_unstructured(layer, "weight", amount=0.5)
        live.undo.append(lambda: prune.remove(layer, "weight"))
        return
    live.undo.append(lambda: parametrize.remove_parametrizations(layer, "weight"))


def dilate_or_pad_otherwise(live: Live) -> None:
    layer = live.layer(nn.Conv2d)
    if layer.kernel_size[0] == 1 or layer.padding == (0, 0):
        raise Inapplicable
    before = dict(vars(layer))
    layer.padding_mode = "circular"
    layer._reversed_padding_repeated_twice = [side for side in reversed(layer.padding) for _ in range(2)]
    names = ("padding_mode", "_reversed_padding_repeated_twice")
    live.undo.append(lambda: vars(layer).update({name: before[name] for name in names}))


def undo_something(live: Live) -> None:
    if not live.undo:
        raise Inapplicable
    # The last first: what was put in before may lie inside.
    live.undo.pop()()


VALUES = (
    optimizer, write_to_data, replace_data, write_without_gradient, write_through_numpy, write_by_a_collective,
    write_through_shared_memory, free_and_fill_storages, write_buffers, load_state, load_state_by_assignment,
    swap_tensors, replace_parameters, replace_a_layer_by_another,
)  # fmt: skip
SETTINGS = (
    replace_the_model_by_a_copy, fuse_again, cast, move_to_another_device_and_back, change_eps, drop_a_bias,
    synchronise_norms, freeze_parameters,
)  # fmt: skip
ODD = (put_a_hook, put_in_an_adapter, replace_a_forward, parametrise, dilate_or_pad_otherwise)
CHANGES = (*VALUES, *SETTINGS, *ODD, *ODD, *[undo_something] * 4)
