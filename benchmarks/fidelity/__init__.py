"""Every published method beside its baseline, on real data."""
