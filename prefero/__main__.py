"""`python -m prefero` is `prefero`."""

import sys

from prefero.cli import main

sys.exit(main())
