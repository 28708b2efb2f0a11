"""What is learned from: datasets as tensors in memory, and how batches are drawn from them."""
