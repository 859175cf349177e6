"""Training of wan-tiny: the film set, the VAE, the transformer and their measurements."""
