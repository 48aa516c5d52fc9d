"""The modules with the demo's example groups, by tiny world: their `demo_group`, WORDS and MAX_REFERENCES."""

from . import demo_group as shapes
from .creatures import demo_group as creatures

DEMO_GROUPS = {"creatures": creatures, "shapes": shapes}
