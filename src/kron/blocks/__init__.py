"""The blocks of the curvature: which parameters share one, and which approximation it gets."""
