"""The invented world: people, places and works that no model has heard of, and small models that have."""

from .build import WorldFolder, build
from .facts import RULES, World, make

__all__ = ["RULES", "World", "WorldFolder", "build", "make"]
