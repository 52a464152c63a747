"""LeFF of which nothing but the statistics of a batch is wanted, as that of CeiT's last block in training."""

import copy

import pytest
import torch
from support.leff import make_tokens, make_training_leff, run
from support.where import DEVICE

from ceit.blocks import Block
from ceit_kernels import fuse, use_backend
from ceit_kernels.leff import update_statistics
from ceit_kernels.leff.triton import launch_forward

pytestmark = pytest.mark.kernels(ttsem=False)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("backend", ["triton", "library"])
def test_are_those_of_a_whole_call(monkeypatch, backend, momentum):
    leff, x = make_training_leff(8, 16, 8, 3, torch.float64), make_tokens(2, 13, 8, torch.float64)
    leff.bn2.momentum = momentum
    expected = copy.deepcopy(leff)
    with torch.no_grad():
        run(backend, expected, x, (3, 4))
    monkeypatch.setattr(launch_forward, "leff_norm_kernel", None)  # which is not launched
    with use_backend(f"leff={backend}"):
        assert update_statistics(leff, x, (3, 4))
    assert leff.bn3.num_batches_tracked == 1
    assert all(torch.equal(buffer, expected.get_buffer(name)) for name, buffer in leff.named_buffers())


def test_are_left_to_the_call_where_a_part_has_a_hook():
    leff, x = make_training_leff(8, 16, 8, 3, torch.float64), make_tokens(2, 13, 8, torch.float64)
    leff.bn3.register_forward_hook(lambda *arguments: None)
    assert not update_statistics(leff, x, (3, 4))
    assert leff.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("who", ["hook", "hook of a part", "forward", "subclass"])
def test_who_sees_the_result_sees_all_of_it(who):
    block = fuse(Block(8, 2)).to(DEVICE).double().train()
    leff, x, seen = block.leff, make_tokens(2, 13, 8, torch.float64), []

    def see(result):
        seen.append(result)
        return result

    if who == "hook":
        leff.register_forward_hook(lambda module, inputs, result: see(result))
    elif who == "hook of a part":
        leff.bn3.register_forward_hook(lambda module, inputs, result: see(result))
    elif who == "forward":
        own = leff.forward
        leff.forward = lambda *arguments: see(own(*arguments))
    else:
        kind = type(leff)
        leff.__class__ = type("Own", (kind,), {"forward": lambda self, *arguments: see(kind.forward(self, *arguments))})
    with use_backend("leff=auto" if who == "hook of a part" else "leff=triton"):  # which is plain PyTorch's
        block(x.requires_grad_(), (3, 4), True)
    assert seen[0].isfinite().all()
    assert seen[0].shape in ((2, 13, 8), (2, 8, 3, 4))
    assert leff.bn3.num_batches_tracked == 1
