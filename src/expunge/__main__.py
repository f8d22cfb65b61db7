"""`python -m expunge`, also under `accelerate launch -m expunge`."""

from .cli import main
from .processes import leave

leave(main())
