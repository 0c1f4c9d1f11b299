"""Answers: what is right, and in what form."""
