"""Many hosts: how they find each other, what the first tells the others, watchdogs."""
