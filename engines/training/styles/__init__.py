"""Training of styles: a few captioned clips teach a LoRA their look."""
