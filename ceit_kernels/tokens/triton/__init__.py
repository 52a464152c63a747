"""The operators on a GPU, in Triton; imported when a kernel is launched."""

MAX_TENSORS = 16  # that are put together
