"""A user's own rewards, in processes of their own."""
