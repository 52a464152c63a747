"""Calls the compiled operators as a small model does, but with empty tensors.

Prints a line for each call that ended its process, then how many were tried: started by test_empty_operands.py.
"""

import contextlib
import os

import torch
from torch._ops import OpOverload, OpOverloadPacket

from ceit import CeiT
from ceit_kernels import freeze, fuse


def recorded_calls():
    """One call of every compiled operator that a model's training and inference make: {name: (operator, arguments)}."""
    calls = {}
    originals = {cls: cls.__call__ for cls in (OpOverloadPacket, OpOverload)}

    def recording(original):
        def call(self, *arguments, **keywords):
            name = str(self).removesuffix(".default")
            if name.startswith("ceit._"):
                calls.setdefault(name, (self, arguments))
            return original(self, *arguments, **keywords)

        return call

    for cls, original in originals.items():
        cls.__call__ = recording(original)
    model = fuse(CeiT(img_size=64, embed_dim=64, depth=2, num_heads=2, num_classes=5))
    images = torch.randn(2, 3, 64, 64)
    model(images).sum().backward()
    model.eval()
    model(images).sum().backward()
    with torch.no_grad():
        model(images)
        freeze(model)(images)
    for cls, original in originals.items():
        cls.__call__ = original
    return calls


def emptied(tensor):
    """Empty tensors of the same number of dimensions, and one of one dimension."""
    shapes = [[*tensor.shape[:i], 0, *tensor.shape[i + 1 :]] for i in range(tensor.ndim)]
    return [tensor.new_empty(shape) for shape in (*shapes, [0] * tensor.ndim, [0])]


def variations(arguments):
    """The arguments with one tensor emptied, a list of them shortened, or all emptied."""
    for i, value in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            changes = emptied(value)
        elif isinstance(value, list | tuple) and any(isinstance(part, torch.Tensor) for part in value):
            changes = [[]]
            for j, part in enumerate(value):
                if isinstance(part, torch.Tensor):
                    changes += [[*value[:j], empty, *value[j + 1 :]] for empty in emptied(part)[-2:]]
        else:
            continue
        for change in changes:
            yield [*arguments[:i], change, *arguments[i + 1 :]]

    def all_emptied(value):
        if isinstance(value, torch.Tensor):
            return value.new_empty([0] * value.ndim)
        return [all_emptied(part) for part in value] if isinstance(value, list | tuple) else value

    yield [all_emptied(value) for value in arguments]


def first_that_ends_the_process(calls):
    """The place of the first call that a child process did not survive, whatever the others return or raise."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for _, operator, arguments in calls:
            os.write(write, b".")
            with contextlib.suppress(Exception), torch.no_grad():
                operator(*arguments)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as begun:
        count = len(begun.read())
    return None if os.waitpid(child, 0)[1] == 0 else count - 1


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    calls = [
        (name, operator, changed)
        for name, (operator, arguments) in recorded_calls().items()
        for changed in variations(arguments)
    ]
    start = 0
    while (place := first_that_ends_the_process(calls[start:])) is not None:
        name, _, changed = calls[start + place]
        print("died:", name, [getattr(value, "shape", value) for value in changed])
        start += place + 1
    print("tried", len(calls))


if __name__ == "__main__":
    main()
