def expand(p): return [p]
def load_preset(n): raise ValueError(n)
def describe(n): return n
def format_presets(n): return str(n)
