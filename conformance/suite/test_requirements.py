"""conformance, suite: every requirement as a pytest test."""

from conformance.core.check import as_test
from conformance.core.judge import CHECKS
from conformance.core.trial import load_suite

load_suite()
for _id, _check in CHECKS.items():
    globals()[f"test_{_id}_{_check.run.__name__.removeprefix('test_')}"] = as_test(_check)
