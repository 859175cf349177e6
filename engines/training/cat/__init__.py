"""Training of the CAT adapter: a small LoRA for merged steps, distilled from the model on all of its tokens."""
