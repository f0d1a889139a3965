"""Text in, measurements out."""
