"""What a model would need and reach on devices that are not here."""
