"""What a network is; knows neither scheduler nor server."""
