"""A laboratory in two dimensions: every preset of the loss core distils small analytic teachers, on a CPU, in seconds."""
