"""Checks of plans and graphs that share no code with what makes them."""
