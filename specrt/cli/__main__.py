"""``python -m specrt.cli``."""

import sys

from specrt.cli import main

sys.exit(main())
