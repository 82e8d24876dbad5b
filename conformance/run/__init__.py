"""conformance, running: the command line, the pytest plugin, reports and deviations."""
