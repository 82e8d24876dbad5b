"""conformance, balance: conditions that checks of several chapters share."""

from conformance.core.check import given
from moe_ref import UNUSED

SOME_UNUSED = given("judged where some slot is unused", lambda case: bool((case.expert_ids_TK == UNUSED).any()))
