"""What surrounds PyTorch's attention on a GPU, in Triton; imported when a kernel is launched."""
