"""What is counted: the entries of the kernels, PyTorch's own kernels, the budgets, the printed tables."""

import importlib
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ceit_kernels
from benchmarks.traffic import CompiledTrafficError, Kernel, compiled, count_call, count_workload, modelled_seconds
from benchmarks.traffic import __main__ as command
from benchmarks.traffic.__main__ import figures, main
from benchmarks.traffic.access import KERNELS, launch_bytes
from benchmarks.traffic.blocks import BLOCKS, count_block
from benchmarks.workloads import PHASES, Workload
from ceit_kernels import FusedLCAAttention, FusedLeFF, backends, use_backend
from ceit_kernels.common.launch import Launch, record_launches

BATCH, TOKENS, CHANNELS = 256, 197, 384
UNIT = BATCH * TOKENS * CHANNELS * 2  # bytes of one pass over the tokens in bfloat16


def leff(**options):
    return lambda: FusedLeFF(CHANNELS, 4 * CHANNELS, **options)


def lca():
    return FusedLCAAttention(CHANNELS, 6, qkv_bias=True)


def moved(kernels):
    return sum(kernel.bytes for kernel in kernels)


def test_every_kernel_has_an_entry_that_names_its_pointers():
    names = set()
    for module in pkgutil.walk_packages(ceit_kernels.__path__, "ceit_kernels."):
        if ".kernels" not in module.name:
            continue
        kernels = importlib.import_module(module.name)
        for name in (name for name in vars(kernels) if name.endswith("_kernel")):
            names.add(name)
            pointers = {argument for argument in getattr(kernels, name).arg_names if argument.startswith("p_")}
            assert {*KERNELS[name].reads, *KERNELS[name].writes} == pointers, name
    assert set(KERNELS) == names


def test_a_kernel_or_a_tensor_without_an_entry_is_an_error():
    def unknown_kernel():
        pass

    def lca_forward_kernel():
        pass

    with pytest.raises(LookupError, match=r"unknown_kernel: expected an entry in .*access\.KERNELS"):
        launch_bytes(Launch(unknown_kernel, (1,), {}, 4, 2))
    with pytest.raises(LookupError, match=r"lca_forward_kernel: expected every tensor .*, got p_new beside \['p_bias'"):
        launch_bytes(Launch(lca_forward_kernel, (1, 1), {"p_new": torch.empty(3)}, 4, 2))


@pytest.mark.parametrize("channels", [192, 384, 768])
def test_leff_makes_two_launches_and_moves_ten_passes_at_inference(channels):
    """The budget is 10.5 passes in 2 launches, weights included; `torch.compile` takes 37 in 6."""
    call = count_call(lambda: FusedLeFF(channels, 4 * channels), (BATCH, TOKENS, channels))
    assert [kernel.name for kernel in call.forward] == ["leff_expand_kernel", "leff_contract_kernel"]
    assert moved(call.forward) <= 10.5 * BATCH * TOKENS * channels * 2
    assert not call.backward


def test_leff_keeps_its_budgets_in_training():
    """`torch.compile` takes 63 passes in 20 kernels forward and 149 in 21 backward."""
    call = count_call(leff(), (BATCH, TOKENS, CHANNELS), training=True)
    # These see no token, only what other program instances left behind for the weights.
    merging = {f"leff_{part}_kernel" for part in ("statistics", "reduce")}
    large = [
        [kernel for kernel in kernels if kernel.bytes > UNIT / 2 and kernel.name not in merging]
        for kernels in (call.forward, call.backward)
    ]
    assert len(large[0]) <= 6
    assert len(large[1]) <= 8
    assert moved(call.forward) <= 21 * UNIT
    assert moved(call.backward) <= 54 * UNIT
    assert call.saved_bytes <= 10.2 * UNIT


@pytest.mark.parametrize("block", BLOCKS[3::2], ids=lambda block: block.name)
def test_the_blocks_of_other_libraries_move_less(block):
    fused, plain = (
        sum(kernel.bytes for kernel in count_block(block, by, 8, "bfloat16", training=False).kernels)
        for by in ("fused", "plain")
    )
    assert fused < 0.45 * plain


def test_a_launch_counts_what_it_reads_of_a_tensor_and_what_it_writes():
    expand, contract = count_call(leff(), (BATCH, TOKENS, CHANNELS)).forward
    image, hidden = UNIT // TOKENS * (TOKENS - 1), UNIT // TOKENS * (TOKENS - 1) * 4
    weight, taps, vectors = 4 * CHANNELS * CHANNELS * 2, 9 * 4 * CHANNELS * 2, 5 * CHANNELS * 2
    scaled_taps = (9 + 1) * 4 * CHANNELS * 4  # in float32, with their shift
    assert expand.bytes == image + hidden + weight + taps + 2 * 4 * vectors + scaled_taps
    assert contract.bytes == hidden + UNIT // TOKENS + UNIT + weight + vectors + scaled_taps
    assert expand.flops == 2 * BATCH * (TOKENS - 1) * 4 * CHANNELS**2


def test_a_second_sweep_over_what_the_cache_cannot_hold_counts_again():
    def attend(images):
        """Bytes of attention, each of whose six heads sweeps over the tokens."""
        with use_backend("lca=triton"):
            return count_call(lca, (images, 12, CHANNELS)).forward[0].bytes

    tokens, out = 12 * CHANNELS * 2, CHANNELS * 2  # of an image; 50 MiB hold the tokens of 5688
    assert attend(5688) - attend(5687) == tokens + out
    assert attend(5689) - attend(5688) == tokens + out + 5 * 5689 * tokens
    assert attend(5690) - attend(5689) == 6 * tokens + out


def test_a_residual_costs_one_pass_more_over_the_image_tokens():
    class WithResidual(nn.Module):
        def __init__(self):
            super().__init__()
            self.leff = leff()()

        def forward(self, x):
            return self.leff(x, residual=x)

    with_residual, without = (count_call(make, (BATCH, TOKENS, CHANNELS)) for make in (WithResidual, leff()))
    # The prefix is read already, to be passed through.
    assert moved(with_residual.forward) - moved(without.forward) == UNIT - UNIT // TOKENS


def test_a_training_step_of_lca_is_recorded_through_autograd():
    """With the projection around it 2 kernels forward and 6 backward; `torch.compile` takes 20."""
    with use_backend("lca=triton"):
        call = count_call(lca, (BATCH, 12, CHANNELS), training=True)
    forward, backward = ([kernel.name for kernel in kernels] for kernels in (call.forward, call.backward))
    assert forward == ["lca_forward_kernel", "aten.addmm"]
    fused = [f"lca_backward_{part}_kernel" for part in ("scores", "input", "weight")]
    assert backward == ["aten.mm", "aten.mm", "aten.sum", *fused]
    tokens = BATCH * 12 * CHANNELS * 2
    assert moved(call.forward) + moved(call.backward) <= 8 * tokens
    assert call.saved_bytes == tokens + BATCH * CHANNELS * 2  # the tokens, and the projection's input


def test_the_backend_counts():
    with use_backend("reference"):
        call = count_call(lca, (BATCH, 12, CHANNELS))
    assert not any(kernel.fused for kernel in call.forward)


def test_recorded_launches_are_for_a_gpu_that_need_not_be_there():
    x = torch.empty(1)
    with record_launches():
        assert backends.choose("lca", x, torch.bfloat16).backend == "triton"
    assert backends.choose("lca", x, torch.bfloat16).backend == "native"


class Pieces(nn.Module):
    """Operators of PyTorch whose bytes can be told by hand."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.empty(8, 4))

    def forward(self, x):
        return self.function(x, self.weight)


def in_place(x, weight):
    y = torch.empty_like(x)
    y.copy_(x)
    y.add_(1)
    return y.zero_()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: x.transpose(0, 1).unflatten(0, (2, 2))[:, 0].detach(), {}),
        (lambda x, w: F.linear(x, w), {"aten.mm": 6 * 4 + 8 * 4 + 6 * 8}),
        (lambda x, w: x + x[:, :1].expand(6, 4), {"aten.add": 24 + 6 + 24}),
        (lambda x, w: torch.cat((x, x[:1]), dim=0), {"aten.cat": 24 + 4 + 28}),
        (in_place, {"aten.copy_": 48, "aten.add_": 48, "aten.zero_": 24}),
    ],
)
def test_an_operator_of_pytorch_reads_its_inputs_and_writes_its_outputs(function, expected):
    call = count_call(lambda: Pieces(function), (6, 4))
    assert {kernel.name: kernel.bytes for kernel in call.forward} == {k: 2 * size for k, size in expected.items()}


def test_attention_is_counted_as_flash_attention():
    def attend(x, _):
        return F.scaled_dot_product_attention(x, x[:, :, :5], x[:, :, 5:10])

    call = count_call(lambda: Pieces(attend), (2, 3, 10, 16), training=True)
    q, k, log_sum_exp = 2 * 3 * 10 * 16 * 2, 2 * 3 * 5 * 16 * 2, 2 * 3 * 10 * 4
    (forward,) = call.forward
    assert forward.bytes == pytest.approx(2 * q + 2 * k + log_sum_exp, abs=32)  # and the state of the generator
    backward = next(kernel for kernel in call.backward if "flash" in kernel.name)
    assert backward.bytes == pytest.approx(4 * q + 4 * k + log_sum_exp, abs=32)


def test_the_flops_of_a_depthwise_convolutions_gradients_are_those_of_its_groups():
    call = count_call(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 5, 5), training=True)
    assert call.forward[0].flops == 2 * 2 * 8 * 25 * 9
    assert call.backward[0].flops == 2 * call.forward[0].flops


def test_a_modelled_time_is_the_longer_of_bytes_and_flops_and_a_launch_for_each():
    kernels = [Kernel("a", 3_000_000, 0, False), Kernel("b", 0, 1_580_000_000, False)]
    assert modelled_seconds(kernels) == pytest.approx((1 + 2 + 2 + 2) * 1e-6)


@pytest.mark.skipif(not torch.__version__.startswith(compiled.STORED_WITH), reason="figures of another PyTorch")
@pytest.mark.parametrize(
    "operator", ["lca", *(pytest.param(it, marks=pytest.mark.prove) for it in compiled.STORED if it != "lca")]
)
def test_the_stored_figures_are_what_torch_compile_does(operator):
    size, dtype, batch, image_size = compiled.STORED_FOR
    workloads = [Workload(operator, size, phase, dtype, batch, image_size) for phase in PHASES]
    assert figures(*(count_workload(workload, "compile") for workload in workloads)) == compiled.STORED[operator]


def lines_of(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_table_shows_the_fused_operators_beside_torch_compile(capsys):
    assert main(["leff", "lca"]) == 0
    lines = lines_of(capsys)
    assert ["leff", "inference", "2", "388.3", "10.0", "6", "1,428.8", "36.9", "9", "2,083.7", "53.8"] in lines
    backward = ["lca", "training", "backward", "6", "13.5", "5.7", "15", "47.9", "20.3"]
    assert backward in [line[:9] for line in lines]


def test_the_table_says_where_there_are_no_kernels(capsys):
    with use_backend("reference"):
        assert main(["leff", "lca"]) == 0
    lines = [line[:-3] for line in lines_of(capsys)]
    assert ["leff", "inference", "-", "-", "-", "6", "1,428.8", "36.9"] in lines
    assert ["lca", "training", "forward", "-", "-", "-", "5", "17.6", "7.5"] in lines


def test_stored_figures_are_shown_for_their_sizes_alone(capsys):
    assert main(["leff", "--batch", "1", "--size", "tiny", "--dtype", "float16"]) == 0
    assert not any(stored in capsys.readouterr().out for stored in ("36.9", "1,428.8"))


@pytest.mark.parametrize("arguments", [["model", "--kernels"], ["leff", "--markdown"]])
def test_kernels_are_listed_if_asked_for(arguments, capsys):
    assert main([*arguments, "--size", "tiny", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "saved for backward" in out
    assert ("leff_contract_kernel" in out) == ("--kernels" in arguments)


def test_times_are_marked_as_modelled(capsys, monkeypatch):
    monkeypatch.setattr(command, "TIMED_BATCHES", (64,))
    assert main(["--times", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "Modelled for an H100, not measured" in out
    assert "| small | 64 | inference | 42 | - | - |" in out


def test_another_pytorchs_compiler_falls_back_on_the_stored_figures(capsys, monkeypatch):
    def refuse(*args):
        raise AttributeError("no such thing")

    monkeypatch.setattr(compiled, "_schedule", refuse)
    assert main(["leff", "--compiled"]) == 0
    captured = capsys.readouterr()
    assert "36.9" in captured.out
    assert captured.err.startswith("the kernels of torch.compile cannot be counted with torch")
    assert main(["--times", "--compiled"]) == 1
    with pytest.raises(CompiledTrafficError, match="no such thing"):
        compiled.count_compiled(leff(), (2, 5, CHANNELS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge"], "--size: invalid choice: 'huge'"),
        (["linear"], "invalid choice: 'linear'"),
        (["--image-size", "100"], "--image-size: expected a multiple of 16, got 100"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--times", "--dtype", "float32"], "--times: expected --dtype bfloat16 or float16, got float32"),
    ],
)
def test_sizes_that_make_no_model_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
