"""The whole GPU pass in one command: build, ceilings, parity, op and encoder benchmarks, profiles. See __main__.py."""
