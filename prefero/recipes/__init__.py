"""Recipes turn a config into objects and run them: the door where configuration stops."""
