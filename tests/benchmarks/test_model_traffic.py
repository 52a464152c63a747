"""The whole-model count: what a model moves, plain and fused."""

import pytest

from benchmarks.traffic import count_workload
from benchmarks.workloads import Workload


def count(implementation, phase, *, operator="model", batch=256):
    return count_workload(Workload(operator, "small", phase, "bfloat16", batch), implementation)


def gigabytes(call):
    return sum(kernel.bytes for kernel in call.kernels) / 1e9


def test_fused_inference_moves_less_than_its_budget():
    """13.5 GB, of which the stem, which has no kernels yet, may take 0.2; `torch.compile` moves 26.9 GB in all."""
    plain, fused = (count(kind, "inference") for kind in ("plain", "fused"))
    stem = count("fused", "inference", operator="i2t")
    assert gigabytes(fused) - gigabytes(stem) <= 13.5 - 0.2
    assert gigabytes(fused) < 0.5 * gigabytes(plain)
    names = [kernel.name for kernel in fused.forward]
    assert names.count("leff_expand_kernel") == names.count("leff_contract_kernel") == 11
    assert names.count("lca_forward_kernel") == 1
    assert names.count("aten._scaled_dot_product_flash_attention") == 12


@pytest.mark.parametrize("phase", ["inference", "training"])
def test_no_residual_connection_takes_a_pass_of_its_own(phase):
    """LeFF adds one to its result, the norm behind attention the other; in backward both norms add gradients."""
    tokens = 256 * 197 * 384 * 2
    call = count("fused", phase)
    additions = [k for k in call.forward + call.backward if k.name == "aten.add" and k.bytes > 2 * tokens]
    assert not additions  # positions are added where tokens are put together


def test_the_gradients_of_class_tokens_take_no_launch():
    call = count("fused", "training")
    assert not [k for k in call.backward if k.name in ("aten.select_backward", "aten.slice_backward")]


def test_a_training_step_launches_what_the_notes_say():
    """330 kernels, where `torch.compile` launches 829."""
    call = count("fused", "training")
    assert len(call.kernels) == 330
    # The last block's LeFF only takes statistics.
    assert [sum(k.name == f"leff_{part}_kernel" for k in call.forward) for part in ("depthwise", "norm")] == [12, 11]
    # Of the classifier's bias; others are summed with positions, both of attention where gradients are put together.
    assert sum(kernel.name == "aten.sum" for kernel in call.backward) == 1
    assert [kernel.name for kernel in call.kernels if kernel.name in ("aten.cat", "aten.add")] == ["aten.add"]
    assert not [kernel for kernel in call.kernels if "native_layer_norm" in kernel.name]


def test_a_training_step_moves_less_than_its_budget():
    """60 GB, of which the stem, which has no kernels yet, may take 0.9."""
    fused = count("fused", "training")
    stem = count("fused", "training", operator="i2t")
    assert gigabytes(fused) - gigabytes(stem) <= 60 - 0.9


def test_a_training_step_counts_forward_and_backward():
    call = count("fused", "training", batch=8)
    assert sum(kernel.name == "aten._scaled_dot_product_flash_attention_backward" for kernel in call.backward) == 12
    assert [k.name for k in call.forward if k.fused and "lca" in k.name] == ["lca_forward_kernel"]
    assert sum(kernel.name.startswith("lca_backward") for kernel in call.backward) == 3
    assert call.saved_bytes > 0


def test_the_gradients_of_queries_keys_and_values_are_put_together_in_one_pass():
    call = count("plain", "training", batch=8)
    assert not [kernel for kernel in call.backward if kernel.name == "aten.clone" and kernel.bytes > 8 * 197 * 384 * 2]
