"""The conformance suite as a function."""
