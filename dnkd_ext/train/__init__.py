"""Training commands: data, models, loops, plots, and the jobs made of them."""
