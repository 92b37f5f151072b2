"""Deployed federations, measured: the same result as at home, what a round costs beside the work, bytes on the wire."""
