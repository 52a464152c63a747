"""The locally-enhanced feed-forward block of CeiT-T and CeiT-S at 224x224."""

OPERATOR = "leff"


def test_leff(report_time, workload, implementation):
    report_time(workload, implementation)
