"""From a checkpoint, or from a seed, to arrays on their devices."""
