"""The operator on a GPU, in Triton; imported when a kernel is launched."""

TICKETS = 32  # counters of a backward call, by which its program instances know who is the last
