"""conformance, the tests of the tests."""
