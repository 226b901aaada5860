"""Recipes, and the state of runs on disk."""

from typing import TYPE_CHECKING

from hf_contmerge.runtime.lazy import attach

if TYPE_CHECKING:
    from hf_contmerge.run.folder import Run as Run
    from hf_contmerge.run.recipe.schema import Recipe as Recipe
    from hf_contmerge.run.recipe.text import load_recipe as load_recipe

attach(__name__, {"Recipe": "recipe.schema", "Run": "folder", "load_recipe": "recipe.text"})
