"""The search for time steps."""
