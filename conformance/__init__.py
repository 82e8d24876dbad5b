"""conformance: the judge. It property-tests Mixture-of-Experts implementations against moe_ref."""

from conformance.core.subject import Routing, Subject, Unsupported

__all__ = ["Routing", "Subject", "Unsupported"]
