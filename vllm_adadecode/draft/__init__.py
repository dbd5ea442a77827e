"""The draft phase: which tokens wait unverified, and the two loops that draft them."""
