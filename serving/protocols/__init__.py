"""How the outside world asks: one file for each protocol, thin, over the one `Service`."""
