"""Commands: ``python -m probekit``."""
