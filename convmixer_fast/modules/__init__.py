"""The modules of users' networks, and the remembered decision behind each of their calls."""
