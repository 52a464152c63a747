"""CeiT with the kernels on its residual stream: everything that the plain model computes."""

import pytest
import torch
from support.where import DEVICE

from ceit import CeiT
from ceit_kernels import BackendError, fuse, use_backend

pytestmark = pytest.mark.kernels(ttsem=False)

SMALL = {"img_size": 32, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}


def make_model(fused, **options):
    torch.manual_seed(0)
    model = CeiT(**SMALL, **options).double().to(DEVICE)
    return fuse(model, leff=False, lca=False, i2t=False) if fused else model


def step(model, images, call=None, backend="triton"):
    """Logits, gradients and buffers of a training step."""
    torch.manual_seed(1)
    with use_backend(f"add_norm={backend}"):
        logits = (model if call is None else call)(images)
        logits.square().sum().backward()  # inside, since checkpointing chooses again when it recomputes
    return [logits, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.fixture
def images():
    torch.manual_seed(2)
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, device=DEVICE)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [{}, {"drop_path_rate": 0.5}, {"global_pool": "avg"}], ids=str)
def test_a_training_step_is_the_plain_models(images, options, checkpointing):
    model = make_model(True, **options)
    model.set_grad_checkpointing(checkpointing)
    assert_same(step(model, images), step(make_model(False, **options), images))


@pytest.mark.parametrize("part", ["", ".norm1", ".norm2", ".add_norm"])
def test_a_hook_sees_what_it_sees_in_the_plain_model(images, part):
    seen = []
    for fused in (True, False):
        model = make_model(fused)
        model.get_submodule(f"blocks.1{part}").register_forward_hook(lambda module, args, out: seen.append(out))
        results = step(model, images, backend="auto")
        assert_same(results, step(make_model(False), images))
    ours, theirs = (out if isinstance(out, torch.Tensor) else out[0] for out in seen[:: len(seen) // 2])
    assert_same(ours, theirs)


def test_a_hooked_norm_is_an_error_where_the_kernels_were_asked_for(images):
    model = make_model(True)
    model.blocks[1].norm2.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendError, match="norm has a hook"):
        step(model, images)


def test_evaluation_with_and_without_gradients_is_the_plain_models(images):
    model, plain = make_model(True).eval(), make_model(False).eval()
    assert_same(step(model, images), step(plain, images))
    with torch.no_grad(), use_backend("add_norm=triton"):
        assert_same(model(images), plain(images))
        assert_same(model.forward_intermediates(images), plain.forward_intermediates(images))


def test_a_training_step_compiles_without_graph_breaks(images):
    model = make_model(True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(step(model, images, compiled), step(make_model(False), images))


def test_state_and_order_of_parameters_are_the_plain_models():
    model, plain = make_model(True), make_model(False)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
