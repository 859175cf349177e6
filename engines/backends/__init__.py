"""Engines: the stack of transformer blocks, run or compiled in several ways behind one contract."""
