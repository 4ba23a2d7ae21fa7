"""Measurements. Each script refuses to print a speed while what it measures computes something wrong."""
