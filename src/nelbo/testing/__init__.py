"""Contracts that every part of the package satisfies, for parts of your own too; needs pytest.

    from nelbo.testing import ScheduleContract

    class TestMine(ScheduleContract):
        ends = (-7.0, 6.0)

        @pytest.fixture
        def schedule(self):
            return Mine(-7.0, 6.0)

The tests of a contract are inherited. Nothing else in the package imports this folder.
"""

from nelbo.testing.assertions import assert_mean, orders
from nelbo.testing.contracts import DiscreteContract, ProcessContract, ScheduleContract
from nelbo.testing.networks import NetworkContract
from nelbo.testing.readers import ReaderContract

__all__ = [
    "DiscreteContract",
    "NetworkContract",
    "ProcessContract",
    "ReaderContract",
    "ScheduleContract",
    "assert_mean",
    "orders",
]
