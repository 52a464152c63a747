"""Times workloads with the packages of one checkout, for --compare.

Started with the path CHECKOUT. The benchmarks are this checkout's, `ceit` and `ceit_kernels` those of CHECKOUT.
Standard input has one JSON list a line, ["prepare", workload, implementation] or ["sample"]; each is answered by one
line of JSON on standard output.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, sys.argv[1])

import torch

import ceit_kernels

from ..workloads import Workload
from .implementations import build
from .timing import make_timer


def prepare(fields: dict[str, Any], implementation: str) -> tuple[str, Callable[[], float]]:
    """The implementation that this checkout has, and a function that returns the seconds of one call of it."""
    workload = Workload(**fields)
    if not hasattr(ceit_kernels, "freeze"):
        implementation = "fused"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = workload.make_module().to(device, workload.torch_dtype)
    (x,) = workload.make_inputs(1, device)
    step = build(implementation, workload, module, x)
    return implementation, make_timer(device).prepare(lambda _: step.run(x), 1).sample


def main() -> None:
    """Answer requests until standard input ends."""
    # What libraries print must not be taken for answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    sample = None
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            if command == "prepare":
                answer, sample = prepare(*arguments)
            else:
                answer = sample()
            print(json.dumps({"answer": answer}), file=answers, flush=True)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)


if __name__ == "__main__":
    main()
