"""The verification step: what each unverified token still has to run, and the passes over it."""
