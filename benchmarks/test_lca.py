"""Class-token attention across the layers of CeiT-T and CeiT-S."""

OPERATOR = "lca"


def test_lca(report_time, workload, implementation):
    report_time(workload, implementation)
