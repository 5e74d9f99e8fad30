"""``python -m probekit``: see :mod:`probekit.cli.main`."""

import sys

from probekit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
