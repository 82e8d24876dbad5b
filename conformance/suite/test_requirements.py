"""conformance, suite: every requirement is a pytest test, made of the checks of the chapters."""

from conformance.core.check import CHECKS
from conformance.core.trial import as_test
from conformance.run import kinds  # noqa: F401  (its chapters register their checks)

for _test in map(as_test, CHECKS.values()):
    globals()[_test.__name__] = _test
