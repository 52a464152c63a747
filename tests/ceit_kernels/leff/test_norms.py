"""Running statistics, kept as torch.nn.BatchNorm2d keeps them, and statistics over several processes."""

import copy

import pytest
import torch
from support.leff import make_tokens, make_training_leff, run, train_step
from support.leff_processes import IMAGES, run_processes
from support.where import DEVICE
from torch import nn

from ceit_kernels.leff.norms import of_module, process_group_of

NORMS = ("bn1", "bn2", "bn3")


def compare_buffers(fused, plain):
    for name, buffer in fused.named_buffers():
        expected = plain.get_buffer(name)
        assert buffer.dtype == expected.dtype, name
        torch.testing.assert_close(buffer, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.kernels(ttsem=False)
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_are_those_of_batchnorm_from_call_to_call(momentum):
    fused = make_training_leff(8, 16, 8, 3, torch.float32)
    for norm in NORMS:
        getattr(fused, norm).momentum = momentum
    plain = copy.deepcopy(fused)
    for seed in range(2 if momentum == 1.0 else 3):
        for backend, leff in (("triton", fused), ("reference", plain)):
            run(backend, leff, make_tokens(2, 7, 8, torch.float32, seed=seed), (2, 3))
        compare_buffers(fused, plain)
    assert fused.bn1.num_batches_tracked == seed + 1


@pytest.mark.kernels(ttsem=False)
def test_norms_of_several_momenta_and_modes_go_together():
    fused = make_training_leff(8, 16, 8, 3, torch.float32, norms="bfb")
    fused.bn1.momentum, fused.bn3.momentum = 0.3, None
    plain = copy.deepcopy(fused)
    x = make_tokens(2, 5, 8, torch.float32)
    for _ in range(2):
        with torch.no_grad():
            run("triton", fused, x)
        run("reference", plain, x)
        compare_buffers(fused, plain)
    assert fused.bn2.num_batches_tracked == 0


@pytest.mark.kernels(ttsem=False)
def test_follow_train_and_eval():
    fused = make_training_leff(8, 16, 8, 3, torch.float32)
    plain = copy.deepcopy(fused)
    x = make_tokens(2, 5, 8, torch.float32)
    for mode in (True, False, True):
        out, expected = run("triton", fused.train(mode), x), run("reference", plain.train(mode), x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        compare_buffers(fused, plain)
    assert fused.bn1.num_batches_tracked == 2


@pytest.mark.kernels(ttsem=False)
@pytest.mark.parametrize("training", [True, False])
def test_without_running_statistics_the_batch_has_them(training):
    fused = make_training_leff(8, 16, 8, 3, torch.float64)
    for name in NORMS:
        channels = getattr(fused, name).num_features
        setattr(fused, name, nn.BatchNorm2d(channels, track_running_stats=False).to(DEVICE, torch.float64))
    fused.train(training)
    x, grad_out = (make_tokens(2, 5, 8, torch.float64, seed=seed) for seed in (0, 1))
    ours, theirs = (train_step(backend, fused, x, grad_out) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(run("triton", fused, x), theirs["out"], rtol=1e-10, atol=1e-10)


@pytest.mark.kernels(ttsem=False)
def test_without_parameters_the_norm_alone_is_left():
    fused = make_training_leff(8, 16, 8, 3, torch.float64)
    for name in NORMS:
        channels = getattr(fused, name).num_features
        setattr(fused, name, nn.BatchNorm2d(channels, affine=False).to(DEVICE, torch.float64))
    x, grad_out = (make_tokens(2, 5, 8, torch.float64, seed=seed) for seed in (0, 1))
    ours, theirs = (train_step(backend, copy.deepcopy(fused), x, grad_out) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.kernels(ttsem=False)
def test_have_the_type_of_their_buffers():
    fused = make_training_leff(8, 16, 8, 3, torch.float16)
    fused.bn1.float()
    plain = copy.deepcopy(fused)
    plain.bn1.half()
    x = make_tokens(2, 5, 8, torch.float16)
    run("triton", fused, x)
    run("reference", plain, x)
    assert fused.bn1.running_mean.dtype == torch.float32
    assert fused.bn2.running_mean.dtype == torch.float16
    for name in NORMS:
        for kind in ("running_mean", "running_var"):
            ours, theirs = (getattr(getattr(leff, name), kind).float() for leff in (fused, plain))
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_norm_is_described_as_its_module_would_compute():
    norm = nn.BatchNorm2d(4, momentum=0.3, eps=1e-3)
    assert of_module(norm)[:4] == (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert of_module(norm)[4:] == (True, 0.3, 1e-3, norm.num_batches_tracked, None)
    assert of_module(norm.eval())[4:] == (False, 0.3, 1e-3, None, None)
    norm.train().track_running_stats = False
    assert of_module(norm)[:2] == (None, None)
    assert of_module(nn.Identity()) is None
    assert of_module(nn.SyncBatchNorm(4)).process_group is None


def test_norms_that_synchronise_differently_are_left_to_plain_pytorch():
    class Group:
        group_name = "others"

    alone = of_module(nn.BatchNorm2d(4))
    together = alone._replace(process_group=Group())
    assert process_group_of([together, None, together]) == ("others", None)
    assert process_group_of([together, alone._replace(training=False), together]) == ("others", None)
    assert process_group_of([alone, None, alone]) == (None, None)
    assert "over the same processes" in process_group_of([together, alone, together])[1]


def assert_one_with_the_joined_batch(leff, tmp_path, **options):
    x, grad_out = (make_tokens(sum(IMAGES), 7, 8, torch.float64, seed=seed) for seed in (0, 1))
    expected = train_step("reference", copy.deepcopy(leff), x, grad_out, (2, 3))
    for results in run_processes(leff, x, grad_out, (2, 3), tmp_path, **options):
        for name, want in expected.items():
            parts = [result[name] for result in results]
            if name in ("out", "x.grad"):
                found = torch.cat(parts)
            elif name.endswith(".grad"):
                found = sum(parts)
            else:
                assert torch.equal(*parts)
                found = parts[0]
            torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.kernels(ttsem=False)
def test_two_processes_with_syncbatchnorm_are_one_with_the_joined_batch(tmp_path):
    assert_one_with_the_joined_batch(make_training_leff(8, 16, 8, 3, torch.float64), tmp_path)


def test_two_processes_on_the_cpu_are_one_with_the_joined_batch(tmp_path):
    assert_one_with_the_joined_batch(make_training_leff(8, 16, 8, 3, torch.float64).cpu(), tmp_path, backend="native")
