"""`python -m expunge`, also under `accelerate launch -m expunge`."""

import sys

from .cli import main

sys.exit(main())
