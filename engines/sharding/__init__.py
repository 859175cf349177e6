"""A group of ranks behind one engine: long sequences over several GPUs, or over processes of one CPU."""
