"""The self-attention of CeiT-T at 224x224, with its two projections."""

OPERATOR = "attention"


def test_attention(report_time, workload, implementation):
    report_time(workload, implementation)
