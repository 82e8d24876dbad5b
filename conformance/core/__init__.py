"""conformance, the core of the judge: it knows no kind, no stage and no framework."""
