"""python -m csp_edge: the command line."""

import sys

from csp_edge.cli import main

sys.exit(main())
