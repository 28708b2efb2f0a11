"""Recipes: YAML files, one per setting, and the typed schema they are checked against."""
