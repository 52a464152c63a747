"""The operator on a GPU, in Triton; imported when a kernel is launched."""
