"""Training: configuration, presets, data, curriculum, loop, and the experiments to reproduce."""
