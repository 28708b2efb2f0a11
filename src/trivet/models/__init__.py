"""What is trained: networks that take images in [0, 1] and return logits, with normalisation inside."""
