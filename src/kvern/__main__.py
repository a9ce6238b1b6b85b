"""`python -m kvern` is the command `kvern`."""

import sys

from kvern.cli import main

sys.exit(main())
