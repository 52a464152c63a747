"""Public functions and constructors say which argument is wrong, whatever is given in its place."""

import pytest
import torch
from torch import nn

import ceit
from ceit_kernels import (
    FusedAttention,
    FusedImage2Tokens,
    FusedLCAAttention,
    FusedLeFF,
    add_layer_norm,
    freeze,
    fuse,
    lca_attention,
    leff_block,
    self_attention,
    unfuse,
    use_backend,
)
from ceit_kernels.common.arguments import names_its_arguments

BAD = (None, "text", 1.5, 0, -1, object(), [], (1,), {}, True, torch.ones(2, dtype=torch.int64), torch.ones(1))
SMALL = {"img_size": 32, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3, "mlp_ratio": 1.0}


def set_backend(backend):
    with use_backend(backend):
        pass


def calls():
    """By name, what is called and good arguments for it."""
    x = torch.randn(2, 5, 8)
    return {
        "lca_attention": (
            lca_attention,
            {
                "x": x, "qkv_weight": torch.randn(24, 8), "qkv_bias": torch.randn(24), "num_heads": 2, "scale": 0.5,
                "dropout_p": 0.5, "seed": torch.tensor([3]),
            },
        ),
        "self_attention": (
            self_attention,
            {"qkv": torch.randn(2, 5, 24), "num_heads": 2, "scale": 0.5, "num_queries": 2, "dropout_p": 0.0},
        ),
        "add_layer_norm": (
            add_layer_norm,
            {"x": x, "branch": x, "weight": torch.ones(8), "bias": torch.ones(8), "eps": 1e-6, "num_prefix_tokens": 1},
        ),
        "FusedLeFF": (
            FusedLeFF,
            {
                "in_features": 8, "hidden_features": 8, "out_features": 8, "kernel_size": 3, "with_bn": True,
                "act_layer": nn.GELU, "num_prefix_tokens": 1, "bias": True, "first_act": True,
                "norm_layer": nn.BatchNorm2d, "layout": "tokens",
            },
        ),
        **{
            kind.__name__: (
                kind,
                {"dim": 8, "num_heads": 2, "qkv_bias": True, "qk_scale": 0.5, "attn_drop": 0.1, "proj_drop": 0.1},
            )
            for kind in (FusedAttention, FusedLCAAttention)
        },
        "FusedImage2Tokens": (FusedImage2Tokens, {"in_chans": 3, "out_chans": 64, "kernel_size": 7, "stride": 2}),
        "leff_block": (
            leff_block,
            {
                "x": x, "weights": [torch.randn(size) for size in ((4, 8, 1, 1), (4, 1, 3, 3), (8, 4, 1, 1))],
                "biases": (None,) * 3, "norms": (None,) * 3, "activations": ("gelu", "gelu"), "grid_size": (2, 2),
                "num_prefix_tokens": 1, "residual": x, "layout": "tokens",
            },
        ),
        "fuse": (fuse, {"model": nn.Linear(2, 2)}),
        "unfuse": (unfuse, {"model": nn.Linear(2, 2)}),
        "freeze": (freeze, {"model": nn.Linear(2, 2), "cuda_graphs": False}),
        "use_backend": (set_backend, {"backend": "auto"}),
        "CeiT": (
            ceit.CeiT,
            {
                **SMALL, "patch_size": 4, "in_chans": 3, "global_pool": "token", "qkv_bias": True, "qk_scale": 0.5,
                "drop_rate": 0.1, "pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1,
                "drop_path_rate": 0.1, "norm_layer": nn.LayerNorm, "leff_local_size": 3, "leff_with_bn": True,
                "dynamic_img_size": False,
            },
        ),
        "create_model": (
            ceit.create_model,
            {"name": "ceit_tiny_patch16_224", "pretrained": False, "fused": False, **SMALL},
        ),
    }  # fmt: skip


CALLS = calls()


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_argument_is_named(name):
    call, good = CALLS[name]
    call(**good)
    for argument in good:
        for value in BAD:
            error = error_of(call, good | {argument: value})
            # Where two do not fit together it may be the other.
            assert error is None or any(each in error for each in good), (argument, value, error)


def error_of(call, arguments):
    try:
        call(**arguments)
    except (TypeError, ValueError, OSError) as error:
        return str(error)


@pytest.mark.parametrize(
    ("sizes", "pair", "message"),
    [((1, 2, 3), (1, 2), "late"), ((), (1, 2), "late"), ((1, "a"), (1, 2), "sizes: "), ((1,), (1, 2, 3), "pair: ")],
)
def test_elements_of_a_tuple_count_too(sizes, pair, message):
    @names_its_arguments
    def call(sizes: tuple[int, ...], pair: tuple[int, int]):
        raise RuntimeError("late")

    with pytest.raises((RuntimeError, TypeError), match=f"^{message}"):
        call(sizes, pair)


SMALLEST = {
    "CeiT": {
        "img_size": 4, "patch_size": 1, "in_chans": 1, "num_classes": 0, "embed_dim": 1, "depth": 1, "num_heads": 1,
        "mlp_ratio": 1.0, "leff_local_size": 1,
    },
    "FusedLeFF": {"in_features": 1, "hidden_features": 1, "out_features": 1, "kernel_size": 1, "num_prefix_tokens": 0},
    "FusedAttention": {"dim": 1, "num_heads": 1},
    "FusedLCAAttention": {"dim": 1, "num_heads": 1},
    "FusedImage2Tokens": {"in_chans": 1, "out_chans": 1, "kernel_size": 1, "stride": 1},
}  # fmt: skip
LARGEST = {
    "CeiT": dict.fromkeys((f"{name}_rate" for name in ("drop", "pos_drop", "proj_drop", "drop_path")), 1.0),
    "FusedAttention": {"attn_drop": 1.0, "proj_drop": 1.0},
    "FusedLCAAttention": {"proj_drop": 1.0},
}


@pytest.mark.parametrize("name", SMALLEST)
def test_the_least_and_the_most_that_is_allowed_is_taken(name):
    make, good = CALLS[name]
    make(**{**good, **SMALLEST[name]})
    make(**{**good, **LARGEST.get(name, {})})
