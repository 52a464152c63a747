"""The residual connections and norms of a block of CeiT-T and CeiT-S at 224x224."""

OPERATOR = "add_norm"


def test_norm(report_time, workload, implementation):
    report_time(workload, implementation)
