"""The stages a checkpoint passes through, the loop of the training stage, and the folder a run leaves behind."""
