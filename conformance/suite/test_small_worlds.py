"""conformance, suite: every case of a few small worlds. Exhaustive where the other tests are random."""

import pytest

from conformance.core.judge import Judge
from conformance.core.kind import Kind
from conformance.run.kinds import KINDS


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_case_of_the_small_worlds(judge: Judge, kind: Kind):
    worlds = list(kind.worlds(judge))
    if not worlds:
        pytest.skip(f"unsupported: no small world of the kind {kind.name}")
    for check, case in worlds:
        judge.examine(check, case)
