"""conformance, suite: every declared deviation still happens."""

from conformance.core.judge import Judge
from conformance.run.conclude import stale


class Stale(AssertionError):
    """Declared deviations that are gone or out of date; the records say which."""

    def __init__(self, records: list[dict]):
        super().__init__("\n\n".join(record["failure"]["page"] for record in records))
        self.records = records


def test_every_declared_deviation_still_happens(judge: Judge):
    records = stale(judge)
    if records:
        raise Stale(records)
