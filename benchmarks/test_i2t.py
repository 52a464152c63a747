"""The image-to-tokens stem at 224x224."""

OPERATOR = "i2t"


def test_i2t(report_time, workload, implementation):
    report_time(workload, implementation)
