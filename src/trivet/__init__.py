"""Trivet trains neural networks that are robust, private and small at once, and proves or measures every claim."""
