"""``python -m mistill``, which launchers such as ``accelerate launch -m mistill`` call."""

from __future__ import annotations

import sys

from mistill.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
