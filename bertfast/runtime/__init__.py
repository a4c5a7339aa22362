"""How inference runs: the whole encoder as one native call, and quantised weights."""
