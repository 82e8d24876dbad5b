"""conformance, the kind sharded: a layer laid over devices."""
