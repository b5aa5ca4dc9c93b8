"""What a hostile, broken or unlucky world does to the server, and what must come out of it."""
