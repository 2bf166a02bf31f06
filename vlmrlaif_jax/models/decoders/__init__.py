"""Families of decoders: settings, published sizes, shardings and tensor names."""
