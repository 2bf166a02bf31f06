"""Records, video decoding, tokenization, packing and the feature store, in NumPy."""
