"""Turn the inputs that a plan names into values: the training state, U with its coefficients, and every E."""
