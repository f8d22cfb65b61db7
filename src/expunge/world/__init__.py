"""The invented world: people, places and works that no model has heard of, and small models that have."""

from .build import WorldFolder, build
from .facts import World, closure, make

__all__ = ["World", "WorldFolder", "build", "closure", "make"]
