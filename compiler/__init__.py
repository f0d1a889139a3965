"""The driver: source, recipe, pipeline, command line."""
