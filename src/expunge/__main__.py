"""`python -m expunge`, also under `accelerate launch -m expunge`."""

import os
import sys

from .cli import main
from .processes import launched

code = main()
if launched()[1] > 1:
    # All is written. Taking the interpreter apart under threads that still serve the other processes may abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
