"""Class-token attention across the layers of CeiT-T and CeiT-S."""

OPERATOR = "lca"


def test_lca(report_time, group, contender):
    report_time(group, contender)
