"""Which parameters share a block of the curvature, and which approximation it gets."""
