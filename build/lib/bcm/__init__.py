"""Bidirectional consistency models in plain PyTorch: one network f(x_t, t, u) walks the flow in both directions."""
