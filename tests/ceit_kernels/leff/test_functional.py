"""``ceit_kernels.leff_block`` without kernels: the reference, FusedLeFF's use of it, and the messages of bad input."""

import copy

import pytest
import torch
from support.leff import make_training_leff
from torch import nn

from ceit_kernels import BackendError, BatchNorm, FusedLeFF, leff_block, use_backend

CHANNELS, HIDDEN = 4, 6


def good_arguments():
    torch.manual_seed(0)
    return {
        "x": torch.randn(2, 10, CHANNELS),
        "weights": [torch.randn(HIDDEN, CHANNELS, 1, 1), torch.randn(HIDDEN, 1, 3, 3), torch.randn(4, HIDDEN, 1, 1)],
        "biases": [torch.randn(HIDDEN), None, torch.randn(CHANNELS)],
        "norms": [BatchNorm(torch.zeros(n), torch.ones(n), training=True) for n in (HIDDEN, HIDDEN, CHANNELS)],
        "num_prefix_tokens": 1,
    }


def arguments_of(module):
    convolutions, norms = (module.conv1, module.conv2, module.conv3), (module.bn1, module.bn2, module.bn3)
    batch_norms = [
        BatchNorm(n.running_mean, n.running_var, n.weight, n.bias, n.training, n.momentum, n.eps, n.num_batches_tracked)
        for n in norms
    ]
    return [c.weight for c in convolutions], [c.bias for c in convolutions], batch_norms


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_is_the_module_as_a_function(training, momentum, backend):
    module = make_training_leff(CHANNELS, HIDDEN, CHANNELS, 5, torch.float32, first_act=False).cpu().train(training)
    for norm in (module.bn1, module.bn2, module.bn3):
        norm.momentum = momentum
    other = copy.deepcopy(module)
    for seed in range(2):
        torch.manual_seed(seed)
        x, residual = torch.randn(2, 2, 7, CHANNELS)
        where = {"grid_size": (2, 3), "num_prefix_tokens": 1}
        with use_backend(f"leff={backend}"):
            out = leff_block(x, *arguments_of(other), activations=("identity", "gelu"), residual=residual, **where)
        with use_backend("leff=reference"):
            torch.testing.assert_close(out, module(x, (2, 3), residual))
    torch.testing.assert_close(other.state_dict(), module.state_dict())


def test_takes_kernels_that_only_plain_pytorch_has():
    arguments = good_arguments()
    arguments["weights"][1] = torch.randn(HIDDEN, 1, 9, 9)
    assert leff_block(**arguments).shape == (2, 10, CHANNELS)
    message = r"the kernels take depthwise kernels of side \(3, 5, 7\), not 9"
    with use_backend("leff=triton"), pytest.raises(BackendError, match=message):
        leff_block(**arguments)


def test_can_be_differentiated_twice_by_the_reference():
    arguments = good_arguments()
    arguments["x"].requires_grad_()
    with use_backend("reference"):
        (grad,) = torch.autograd.grad(leff_block(**arguments).square().sum(), arguments["x"], create_graph=True)
    grad.square().sum().backward()
    assert arguments["x"].grad.abs().sum() > 0


def test_refuses_to_leave_processes_out_of_the_statistics():
    arguments = good_arguments()
    group = type("Group", (), {"group_name": "0"})()
    arguments["norms"] = [norm._replace(process_group=group) for norm in arguments["norms"]]
    message = r"norms\[0\]: plain PyTorch takes statistics over processes only as"
    with use_backend("reference"), pytest.raises(BackendError, match=message):
        leff_block(**arguments)


def changed(name, index, value):
    sequence = list(good_arguments()[name])
    sequence[index] = value
    return {name: sequence}


ONES = torch.ones(HIDDEN)
BAD_ARGUMENTS = {
    "width": ({"x": torch.zeros(2, 10, 5)}, ValueError, r"x: expected shape \(B, N, 4\), got \(2, 10, 5\)"),
    "integers": ({"x": torch.zeros(2, 10, 4).long()}, TypeError, "x: expected a floating-point tensor"),
    "grid": ({"grid_size": (2, 4)}, ValueError, r"grid_size 2 \* 4 = 8 patch tokens, got 10 tokens in all"),
    "two weights": ({"weights": [ONES, ONES]}, ValueError, "weights: expected one for each of 3 layers, got 2"),
    "weight": (changed("weights", 0, ONES), ValueError, r"weights\[0\]: expected shape \(E, C, 1, 1\), got \(6,\)"),
    "hidden": (changed("weights", 2, torch.ones(4, 5, 1, 1)), ValueError, r"weights\[2\]: expected shape \(O, 6, 1, 1"),
    "even": (
        changed("weights", 1, torch.ones(6, 1, 4, 4)),
        ValueError,
        r"weights\[1\]: expected a square kernel of an",
    ),
    "bias": (changed("biases", 1, torch.ones(5)), ValueError, r"biases\[1\]: expected shape \(6\), got \(5,\)"),
    "dtype": (changed("biases", 1, ONES.half()), TypeError, r"biases\[1\]: expected torch.float32 like x, got"),
    "norm": (
        changed("norms", 1, BatchNorm(torch.ones(5), ONES)),
        ValueError,
        r"norms\[1\].running_mean: expected shape \(6\), got \(5,\)",
    ),
    "norm of integers": (
        changed("norms", 1, BatchNorm(ONES.long(), ONES)),
        TypeError,
        r"norms\[1\].running_mean: expected a floating-point tensor, got torch.int64",
    ),
    "no statistics": (
        changed("norms", 1, BatchNorm(None, None)),
        ValueError,
        r"norms\[1\]: expected running statistics where it is not training, got None",
    ),
    "device": (
        changed("norms", 2, BatchNorm(torch.ones(4, device="meta"), torch.ones(4))),
        ValueError,
        r"norms\[2\].running_mean: expected on cpu like x, got meta",
    ),
    "activation": ({"activations": ("gelu", "elu")}, ValueError, "activations: expected of .*'hardswish'.*got 'elu'"),
    "one activation": ({"activations": ("gelu",)}, ValueError, "activations: expected 2, got 1"),
    "residual": ({"residual": torch.ones(2, 9, 4)}, ValueError, r"residual: expected shape \(2, 10, 4\), got"),
    "layout": ({"layout": "nhwc"}, ValueError, "layout: expected one of .*'NHWC'.*got 'nhwc'"),
    "no image": ({"layout": "NHWC"}, ValueError, r"x: expected shape \(B, H, W, 4\), got \(2, 10, 4\)"),
    "channels": (
        {"layout": "NCHW", "x": torch.ones(2, 3, 3, 4)},
        ValueError,
        r"x: expected shape \(B, 4, H, W\), got \(2, 3, 3, 4\)",
    ),
    "prefix of an image": (
        {"layout": "NHWC", "x": torch.ones(2, 3, 3, 4)},
        ValueError,
        "num_prefix_tokens: expected 0 with layout 'NHWC', got 1",
    ),
    "grid of an image": (
        {"layout": "NHWC", "x": torch.ones(2, 3, 3, 4), "num_prefix_tokens": 0, "grid_size": (1, 9)},
        ValueError,
        r"grid_size: expected None or \(3, 3\) like the image x, got \(1, 9\)",
    ),
    "residual of an image": (
        {"layout": "NHWC", "x": torch.ones(2, 3, 3, 4), "num_prefix_tokens": 0, "residual": torch.ones(2, 9, 4)},
        ValueError,
        r"residual: expected shape \(2, 3, 3, 4\), got \(2, 9, 4\)",
    ),
    "one value": ({"x": torch.zeros(1, 2, 4)}, ValueError, "Expected more than 1 value per channel when training"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_what_was_given_and_expected(changes, error, message):
    with pytest.raises(error, match=message):
        leff_block(**(good_arguments() | changes))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_images_come_back_as_images(layout):
    module = FusedLeFF(4, 6, 5, num_prefix_tokens=0, layout=layout)
    shapes = {"NHWC": ((2, 3, 2, 4), (2, 3, 2, 5)), "NCHW": ((2, 4, 3, 2), (2, 5, 3, 2))}[layout]
    assert module(torch.randn(shapes[0])).shape == shapes[1]
    assert list(module.state_dict()) == list(FusedLeFF(4, 6, 5, num_prefix_tokens=0).state_dict())


def test_the_mix_ffn_of_segformer_can_be_built():
    module = FusedLeFF(4, 6, with_bn=False, num_prefix_tokens=0, first_act=False, bias=False)
    assert list(module.state_dict()) == ["conv1.weight", "conv2.weight", "conv3.weight"]
    x = torch.randn(2, 6, 4)
    image = module.conv2(module.conv1(x.mT.unflatten(2, (2, 3))))
    torch.testing.assert_close(module(x, (2, 3)), module.conv3(nn.functional.gelu(image)).flatten(2).mT)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            FusedLeFF(4, norm_layer=lambda channels: nn.GroupNorm(1, channels)),
            "the kernels take BatchNorm2d or .*Identity.* for bn1, not GroupNorm",
        ),
        (FusedLeFF(4, act_layer=nn.ELU), "the kernels take GELU or .* for act, not ELU"),
        (FusedLeFF(4, kernel_size=9), r"of side \(3, 5, 7\), not 9"),
    ],
    ids=["norm", "activation", "kernel"],
)
def test_what_the_kernels_lack_runs_by_plain_pytorch_or_says_why_not(module, reason):
    assert module(torch.randn(2, 5, 4)).shape == (2, 5, 4)
    with use_backend("leff=triton"), pytest.raises(BackendError, match=reason):
        module(torch.randn(2, 5, 4))


def test_the_module_names_a_wrong_layout():
    with pytest.raises(ValueError, match=r"layout: expected one of .*'NCHW'.*got 'nchw'"):
        FusedLeFF(4, layout="nchw")
    with pytest.raises(ValueError, match="num_prefix_tokens: expected 0 with layout 'NCHW', got 1"):
        FusedLeFF(4, layout="NCHW")
