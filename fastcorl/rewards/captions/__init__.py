"""Captions of drawings, and how alike two captions are."""
