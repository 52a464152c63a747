"""Device code of LeFF.

The tokens behind the prefix are the channels-last image already, so nothing is split, permuted or copied.

Names: ``p_`` pointer, ``i_`` index of a program instance, ``o_`` offsets, ``m_`` mask, ``b_`` a tile in registers
with its shape behind it. HW = H * W counts image tokens of an image, P prefix tokens, M = B * HW image tokens of the
batch; C, E and O are the channels of the input, in between and of the output. Image token t of the batch is row
t + (t // HW + 1) * P of x and of the output.

In training, a ``norm`` array has ``NORM_ROWS`` rows of channels: mean, variance, reciprocal deviation, scale, which is
the reciprocal deviation times the weight, and shift, the bias. A ``gradient`` array has ``GRADIENT_ROWS``: mean, a, b
and c, with which the gradient of the norm's input is ``a g + b (z - mean) + c``. Both are in float32, or float64.
"""

NORM_ROWS = 5
GRADIENT_ROWS = 4
