"""Token plans: which latent patches share a token, and what that does to a forward."""
