"""``ceit::join_tokens``, and ``ceit::column_sums`` for its gradient."""

from __future__ import annotations

from functools import reduce

import torch

from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.operator import Operator
from .triton import MAX_TENSORS

__all__ = ["column_sums_operator", "join_tokens_operator"]

_MAX_CHANNELS, _MAX_ROWS = 4096, 2**31 - 4096  # a row is held in registers; rows are counted in 32 bits


class _JoinTokens(Operator):
    # Of several tensors (B, 1, C), or one (1, 1, C) that images share, and a last (B, P, C), to which another may be
    # added: all tokens of an image one behind another, with positions (1, N, C) added.
    name = "join_tokens"
    operator = "add_norm"
    schema = "(Tensor positions, Tensor[] tokens, Tensor? added, bool shared, str backend) -> Tensor"
    public_name = "torch.cat"

    def check(self, positions, tokens, added, shared):
        check_shape("positions", positions, 1, "N", "C")
        if not 0 < len(tokens) <= positions.shape[1]:
            raise ValueError(f"tokens: expected from 1 to {positions.shape[1]} tensors, got {len(tokens)}")
        if shared and len(tokens) != 2:
            raise ValueError(f"tokens: expected two tensors, the first shared by all images, got {len(tokens)}")
        batch, channels = tokens[-1].shape[0], positions.shape[2]
        sizes = [(1 if shared else batch, 1)] * (len(tokens) - 1) + [(batch, positions.shape[1] - len(tokens) + 1)]
        for i, (tensor, size) in enumerate(zip(tokens, sizes, strict=True)):
            check_shape(f"tokens[{i}]", tensor, *size, channels)
            check_floating(f"tokens[{i}]", tensor)
            check_device(f"tokens[{i}]", tensor, positions, "positions")
        check_floating("positions", positions)
        if added is not None:
            check_shape("added", added, *tokens[-1].shape)
            check_dtype("added", added, tokens[-1].dtype, "the last of tokens")
            check_device("added", added, positions, "positions")

    def unsupported(self, positions, tokens, *rest):
        (_, count, channels), batch = positions.shape, tokens[-1].shape[0]
        if len(tokens) > MAX_TENSORS:
            return f"the kernel takes up to {MAX_TENSORS} tensors, not {len(tokens)}"
        if not 0 < channels <= _MAX_CHANNELS:
            return f"the kernel takes from 1 to {_MAX_CHANNELS} channels, positions has {channels}"
        rows = batch * count
        return None if 0 < rows <= _MAX_ROWS else f"the kernel takes from 1 to {_MAX_ROWS} rows, not {rows}"

    def compute_dtype(self, positions, tokens, *rest):
        return reduce(torch.promote_types, [tensor.dtype for tensor in tokens], positions.dtype)

    def autocast(self, dtype, *inputs):
        return inputs

    def forward(self, positions, tokens, added, shared, backend):
        from .triton.launch import join_tokens_triton

        filled = *tokens, *[None] * (MAX_TENSORS - len(tokens))
        return join_tokens_triton(positions, added, *filled, shared, self.compute_dtype(positions, tokens))

    def fake(self, positions, tokens, *rest):
        dtype = self.compute_dtype(positions, tokens)
        return positions.new_empty((tokens[-1].shape[0], *positions.shape[1:]), dtype=dtype)


class _ColumnSums(Operator):
    # The sum of rows (B, N, C) over B, and of matrices (B, F), each as a vector of its dtype; of rows also that of the
    # first of the N alone, (C,), and the others (B, N - 1, C) in one piece. What has no dtype is not made.
    name = "column_sums"
    operator = "add_norm"
    schema = (
        "(Tensor rows, Tensor? rows1, Tensor? rows2, Tensor? rows3, ScalarType? dtype, ScalarType? dtype1, "
        "ScalarType? dtype2, ScalarType? dtype3, ScalarType? first_dtype, ScalarType? rest_dtype, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor first, Tensor rest)"
    )
    public_name = "torch.sum"

    def check(self, rows, *others):
        check_shape("rows", rows, "B", "N", "C")
        check_floating("rows", rows)
        for i, (matrix, dtype) in enumerate(zip(others[:3], others[4:7], strict=True), start=1):
            if matrix is not None:
                check_shape(f"rows{i}", matrix, rows.shape[0], "F")
                check_floating(f"rows{i}", matrix)
                check_device(f"rows{i}", matrix, rows, "rows")
            elif dtype is not None:
                raise ValueError(f"dtype{i}: expected None where rows{i} is None, got {dtype}")

    def unsupported(self, *inputs):
        most = max(0 if matrix is None else max(matrix.shape[0], matrix[:1].numel()) for matrix in inputs[:4])
        empty = any(matrix is not None and not matrix.numel() for matrix in inputs[:4])
        return f"the kernel takes from 1 to {_MAX_ROWS} rows and columns" if empty or most > _MAX_ROWS else None

    def autocast(self, dtype, *inputs):
        return inputs

    def forward(self, *inputs):
        from .triton.launch import column_sums_triton

        return column_sums_triton(*inputs[:-1])

    def fake(self, *inputs):
        (batch, count, channels), dtypes = inputs[0].shape, inputs[4:10]
        columns = [0 if matrix is None else matrix[:1].numel() for matrix in inputs[:4]]
        shapes = [*((size,) for size in columns), (channels,), (batch, count - 1, channels)]
        return tuple(
            None if dtype is None else inputs[0].new_empty(shape, dtype=dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )


join_tokens_operator, column_sums_operator = _JoinTokens(), _ColumnSums()
