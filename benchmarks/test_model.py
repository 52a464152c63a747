"""Whole models of the CeiT family at 224x224."""

OPERATOR = "model"


def test_model(report_time, workload, implementation):
    report_time(workload, implementation)
