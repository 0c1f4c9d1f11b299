"""How alike images are, and an image and its caption."""
