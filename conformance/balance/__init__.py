"""conformance, the kind balance: counts, losses, capacities and masks of a routed batch."""
