"""Second-order optimisation and model parallelism for JAX."""
